"""The survey's six ways to ask on language models (card 165): who is asked what, what is kept of it, what is learnt."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from staged import player
from torch import Tensor
from watching import watched

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.data.elicited import Form, Ranked, Written, answered, best_and_worst, in_order, invented, whole_lists
from stillhouse.data.responses import Coder
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.reward import new_reward_model
from stillhouse.objectives.language import head_of
from stillhouse.objectives.ranked_responses import RankedResponses, RewardOrder, preferring_by_mean
from stillhouse.rl.rollouts import RolloutSource
from stillhouse.rl.sampling import Response
from stillhouse.systems.language.elicitation_lm import ElicitationLM
from stillhouse.tasks import lm_elicitation
from stillhouse.tasks.lm_elicitation import WAYS
from stillhouse.teachers.answers import Answer

sys.path += [str(Path(__file__).parents[1] / "systems"), str(Path(__file__).parents[1] / "faults")]
import helpers

# -- what was written, read back -------------------------------------------------------------------------------------

FORM = Form("Q: {prompt} A: {response}", r"(?s)Q:\s*(.+?)\s*A:\s*(.+)", marked=True)


def test_answers_that_do_not_parse_are_dropped_and_counted():
    written = [[Written("so 3 # 3")], [Written("so 3 # 3", finished=False)], [Written("no idea")], [Written(None)]]
    found = answered(["a", "b", "c", "d"], written, FORM)
    assert found.pairs == [("a", "so 3 # 3")]
    assert found.figures() == {"kept": 1, "dropped": 3, "unfinished": 1, "unparsed": 1, "failed": 1}
    assert "1 of 4 kept" in str(found) and "1 unfinished" in str(found)


def test_the_majority_answers():
    three = [[Written("x # 4"), Written("y # 5"), Written("z # 5"), Written("w # 5", finished=False)]]
    assert answered(["a"], three, FORM).pairs == [("a", "y # 5")]
    assert answered(["a"], three, FORM, least=0.5).pairs == [("a", "y # 5")]
    found = answered(["a"], three, FORM, least=0.51)  # the answer that was cut has no vote, but was asked for
    assert found.pairs == [] and found.figures()["outvoted"] == 1


def test_new_problems_are_new():
    texts = ["Q: 1+1= A: # 2", "well. Q: 2+2=\nA: # 4", "Q:  2+2=  A: # 5", "3+3= # 6", "Q: 4+4= A: eight", "Q: A: # 1"]
    found = invented([Written(text) for text in texts], FORM, known={"1+1="})
    assert found.pairs == [("2+2=", "# 4")]
    assert found.figures() == {"kept": 1, "dropped": 5, "known": 2, "unparsed": 3}


def test_guesses_are_ordered_without_ties():
    found = in_order("a", ["p", "q", "r", "p", "s"], [False, True, False, False, False], [-2.0, -1.0, -3.0, -2.0, -3.0])
    assert found == Ranked("a", ("q", "p", "r"), (True, False, False))
    assert in_order("a", ["p", "p"], [False, False], [-1.0, -1.0]) is None
    assert in_order("a", ["p", "q"], [False, False], [-1.0, -1.0]) is None
    assert in_order("a", ["p", "q"], [False, False], [-1.0, math.nan]) is None


@pytest.mark.parametrize(("pattern", "said"), [("(.+", "no regular expression"), ("(.+)", "1 groups")])
def test_patterns_that_cannot_be_used(pattern, said):
    with pytest.raises(ConfigError, match=said):
        Form("{prompt}{response}", pattern)


# -- who is asked what -----------------------------------------------------------------------------------------------

WORDS = helpers.WORDS


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def problems(count: int = 30) -> list[dict[str, str]]:
    """Different prompts; the answer is the next word."""
    at = [(place, WORDS[place % 16], WORDS[(place // 16 + place + 3) % 16]) for place in range(count)]
    return [{"prompt": f"the {a} sees {b}", "answer": f" and # {WORDS[(n + 1) % 16]}"} for n, a, b in at]


def small(materials: helpers.Materials, folder: Path, records: Any = None, **fields: Any) -> ElicitationLM:
    folder.mkdir(exist_ok=True)
    data = folder / "problems.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in records or problems()))
    values = {
        **{"model": str(materials.teacher), "teacher": str(materials.teacher), "data": str(data), "steps": 2},
        **{"labelled": 6, "batch_size": 4, "seed_epochs": 2.0, "max_new_tokens": 6, "lr": 1e-2, "asked": 8},
        **{"example_template": "{prompt} | {response}", "example_pattern": r"(.+?) \| (.+)", "eval_samples": 1},
    }
    found = ElicitationLM.make(**{**values, **fields})
    assert isinstance(found, ElicitationLM)
    return found


class Scripted:
    """Stands in for a model that writes: ``write`` gives the text for a request's prompt and sample."""

    write: Callable[[str, int], str]
    asked: list[tuple[str, str]]  # (stage, prompt)

    def __init__(self, name: str, *_: Any, **__: Any) -> None:
        self.name = name

    def answers(self, left: Any, *, everything: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, request in left.items():
            prompt = request.messages[0]["content"]
            Scripted.asked.append((self.name, prompt))
            yield key, Answer(text=Scripted.write(prompt, request.sample), finish_reason="stop").record()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    Scripted.asked, Scripted.write = [], staticmethod(lambda prompt, sample: f" so # {prompt.split()[-1]}")
    monkeypatch.setattr(lm_elicitation, "LocalTeacher", Scripted)
    return Scripted


def walked(system: ElicitationLM, folder: Path, until: str = "student") -> tuple[dict[str, Any], dict[str, Any]]:
    return watched(system, folder / "run", until=until)


def prompts_of(path: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}


@pytest.mark.parametrize("ask", ["labelling", "feature", "self-knowledge", "feedback"])
def test_nobody_reads_the_answers_of_the_pool(ask, materials, tmp_path, scripted):
    scripted.write = lambda prompt, sample: f" {WORDS[(len(prompt) + sample) % 16]} # {len(prompt)}"
    first = small(materials, tmp_path / "one", ask=ask)
    stages, left = walked(first, tmp_path / "one")
    seeds = {tuple(row[0]) for row in stages["seeds"].source.data}
    tokenizer = load_causal_lm(str(materials.teacher))[1]
    known = {one["prompt"] for one in problems() if tuple(tokenizer(one["prompt"])["input_ids"]) in seeds}
    assert len(known) == 6
    spoilt = [one if one["prompt"] in known else {**one, "answer": "nothing but lies # 0"} for one in problems()]
    _, other = walked(small(materials, tmp_path / "two", spoilt, ask=ask), tmp_path / "two")
    assert left["elicited"].json() == other["elicited"].json()
    one, two = (helpers.weights(run["seeds"].path) for run in (left, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    taught = [prompt for _, prompt in scripted.asked]
    assert not [text for text in taught if any(prompt in text for prompt in known)]  # the others are asked about


@torch.no_grad()
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_student_minimises_the_loss_of_the_seeds_and_of_what_was_elicited(weight, materials, tmp_path, scripted):
    stages, _ = walked(small(materials, tmp_path, ask="labelling", weight=weight), tmp_path)
    learner = player(stages["student"])
    batch, model = next(stages["student"].source), learner.trained[0].module.eval()

    def cross_entropy(rows: Any) -> Tensor:
        on = rows["loss_mask"][:, 1:].bool()
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[on], rows["input_ids"][:, 1:][on])

    elicited, seeds = cross_entropy(batch), cross_entropy(batch["text"])
    assert learner.objective(batch, 0.0).item() == pytest.approx((seeds + weight * elicited).item(), rel=1e-4)
    assert abs(elicited - seeds) > 1e-2


def test_what_is_labelled_is_the_teacher_s_and_stands_beside_the_seeds(materials, tmp_path, scripted):
    """A student of the seeds alone would get none of it."""
    system = small(materials, tmp_path, ask="labelling", votes=2)
    stages, left = walked(system, tmp_path)
    pairs = left["elicited"].json()["pairs"]
    assert len(pairs) == 8 and all(response == f"so # {prompt.split()[-1]}" for prompt, response in pairs)
    assert len(scripted.asked) == 16 and all(text.startswith("Solve this problem") for _, text in scripted.asked)
    tokenizer = load_causal_lm(str(materials.teacher))[1]
    batch = next(stages["student"].source)
    elicited, seeds = (tokenizer.batch_decode(rows["input_ids"]) for rows in (batch, batch["text"]))
    assert len(elicited) == len(seeds) == 4
    assert all("so #" in text for text in elicited) and all(" and #" in text for text in seeds)
    alone = walked(small(materials, tmp_path / "none", ask="none"), tmp_path / "none")[0]
    assert "text" not in next(alone["student"].source) and "elicited" not in alone


def test_expansion_shows_seeds_and_curation_shows_none(materials, tmp_path, scripted):
    scripted.write = lambda prompt, sample: f"the river hears {sample} | so # {sample}"
    shown = {}
    for ask in ("expansion", "curation"):
        fields: dict[str, Any] = {"ask": ask, "demonstrations": 3, "topics": "rivers,old stones"}
        scripted.asked.clear()
        stages, left = walked(small(materials, tmp_path / ask, **fields), tmp_path / ask)
        assert len(left["elicited"].json()["pairs"]) == 8
        shown[ask] = [prompt for _, prompt in scripted.asked]
        rows = {tuple(row[0]) for row in stages["seeds"].source.data}
    tokenizer = load_causal_lm(str(materials.teacher))[1]
    seeds = [one for one in problems() if tuple(tokenizer(one["prompt"])["input_ids"]) in rows]
    others = [one for one in problems() if one not in seeds]
    texts = [f"{one['prompt']} | {one['answer']}" for one in seeds]
    for request in shown["expansion"]:
        assert sum(text in request for text in texts) == 3
        assert not any(one["prompt"] in request for one in others)
    drawn = {tuple(text in request for text in texts) for request in shown["expansion"]}
    assert len(drawn) > 1  # drawn anew for each request
    for number, request in enumerate(shown["curation"]):
        assert ("rivers", "old stones")[number % 2] in request
        assert not any(one["prompt"] in request or one["answer"] in request for one in problems())


def test_a_new_problem_that_is_held_out_or_a_seed_is_not_learnt(materials, tmp_path, scripted):
    copied = problems()
    scripted.write = lambda prompt, sample: f"{copied[sample]['prompt']} | so # 1"
    system = small(materials, tmp_path, ask="expansion", asked=30, validation=0.3)
    _, left = walked(system, tmp_path)
    figures = left["elicited"].metrics
    assert figures["known"] == 9 + 6 and figures["kept"] == 15  # 30 problems: 9 held out, 6 seeds
    scripted.write = lambda prompt, sample: "just words"
    with pytest.raises(DataError, match="0 of 8 kept; 8 unparsed"):
        walked(small(materials, tmp_path / "bad", ask="expansion"), tmp_path / "bad")


def test_self_knowledge_never_touches_the_teacher(materials, tmp_path, scripted):
    scripted.write = lambda prompt, sample: f" so # {min(sample, 4)}" if "cat" not in prompt else f" so # {sample}"
    system = small(materials, tmp_path, ask="self-knowledge", teacher="/nowhere/at/all", votes=8, asked=20)
    _, left = walked(system, tmp_path, until="")
    pairs = left["elicited"].json()["pairs"]
    assert pairs and all(response == "so # 4" and "cat" not in prompt for prompt, response in pairs)
    assert all(prompt in prompts_of(tmp_path / "problems.jsonl") for _, prompt in scripted.asked)  # no instruction
    assert left["elicited"].metrics["outvoted"] >= 1 and "teacher/accuracy" not in left["evaluation"].metrics
    assert left["evaluation"].metrics["elicited"] == len(pairs)


def likelihood(where: Path, prompt: str, text: str, cut: bool) -> float:
    """Mean log-probability of a response's tokens, from nothing but the model's forward."""
    model, tokenizer = load_causal_lm(str(where))
    coder = Coder(tokenizer)
    before, after = coder.row(prompt, text)
    ids = torch.tensor([[*before, *(after[:-1] if cut else after)]])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    own = log_p.gather(1, ids[0, 1:, None])[len(before) - 1 :, 0]
    return float(own.mean())


def test_guesses_are_ranked_by_the_teacher_s_likelihood(materials, tmp_path):
    """Another teacher, another order; each is what the model's own forward says, given the instruction."""
    from staged import moved

    model, tokenizer = load_causal_lm(str(materials.teacher))
    moved(model, "another", 0.5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    orders = []
    for number, teacher in enumerate((materials.teacher, tmp_path / "other")):
        system = small(materials, tmp_path / f"{number}", ask="feedback", teacher=str(teacher), asked=4)
        system.answer_template = "old {prompt}"
        stages, left = walked(system, tmp_path / f"{number}")
        lists = left["elicited"].json()["ranked"]
        for one in lists[:2]:
            scores = [
                likelihood(teacher, f"old {one['prompt']}", *pair)
                for pair in zip(one["texts"], one["cut"], strict=True)
            ]
            assert scores == sorted(scores, reverse=True) and len(scores) > 1
        orders.append({one["prompt"]: one["texts"] for one in lists})
        batch = next(stages["student"].source)
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        half = len(texts) // 2
        ends = {one["prompt"]: (one["texts"][0], one["texts"][-1]) for one in lists}
        for better, worse in zip(texts[:half], texts[half:], strict=True):
            prompt = next(prompt for prompt in ends if better.startswith(prompt) and worse.startswith(prompt))
            assert (better, worse) == (prompt + ends[prompt][0], prompt + ends[prompt][1])
    same = {prompt for prompt in orders[0] if set(orders[0][prompt]) == set(orders[1].get(prompt, []))}
    assert same and any(orders[0][prompt] != orders[1][prompt] for prompt in same)


# -- what is learnt --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(materials) -> tuple[Any, Any, Coder]:
    """Two models of one tokenizer."""
    from staged import moved

    model, tokenizer = load_causal_lm(str(materials.teacher))
    other, _ = load_causal_lm(str(materials.teacher))
    return model, moved(other, "student", 0.2), Coder(tokenizer)


def observed(model: Any, **options: Any) -> Observed:
    return Observed(model, options={"use_cache": False}, **options)


def lesson(learn: str, student: Observed, *, teacher: Any = None, first: Any = None, **fields: Any) -> Any:
    """The system's own objective for a way of learning."""
    system = ElicitationLM.make(**fields)
    asking = SimpleNamespace(
        observed_teacher=lambda: observed(teacher, frozen=True, name="teacher"),
        frozen=lambda artifact, name: observed(first, frozen=True, name=name),
        vocabulary=None,
    )
    return system.lesson(asking, None, learn, student)  # type: ignore[attr-defined]


def mean_log_p(model: Any, batch: Any) -> Tensor:
    """(B): log p of the response's tokens, over their number."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    log_p = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["loss_mask"][:, 1:].double()
    return (log_p * mask).sum(1) / mask.sum(1)


LISTS = [
    Ranked("the cat", (" sees a bird", " hears", " and then never the"), (False, False, True)),
    Ranked("a river", (" finds old", " sees the"), (False, False)),
]


def test_features_are_matched_on_the_response_alone(pair):
    """Forward KL at the tokens that are answered, whatever stands in the prompt."""
    teacher, student, coder = pair
    batch = coder.batch([coder.row("the cat", " sees a bird"), coder.row("a river hears the", " stone")])
    value = lesson("divergence", observed(student), teacher=teacher, ask="feature")(batch, 0.0)
    at = batch["loss_mask"][:, 1:].bool()
    with torch.no_grad():
        p, q = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, :-1][at].double().log_softmax(-1)
            for model in (teacher, student)
        )  # fmt: skip
        kl, reverse = (p.exp() * (p - q)).sum(-1).mean(), (q.exp() * (q - p)).sum(-1).mean()
    assert value.item() == pytest.approx(kl.item(), rel=1e-4)
    back = lesson("divergence", observed(student), teacher=teacher, ask="feature", divergence="reverse-kl")(batch, 0.0)
    assert back.item() == pytest.approx(reverse.item(), rel=1e-4) and abs(kl - reverse) > 1e-3
    same = lesson("divergence", observed(teacher), teacher=teacher, ask="feature")(batch, 0.0)
    assert same.item() == pytest.approx(0.0, abs=1e-6)


def test_features_are_asked_about_the_seeds_text_too(materials, tmp_path, scripted):
    stages, left = walked(small(materials, tmp_path, ask="feature"), tmp_path)
    assert len(stages["student"].source.sources[0].data) == 6 + len(left["elicited"].json()["pairs"])


def test_ranking_losses_of_lists_of_any_length(pair):
    _, student, coder = pair
    batch = whole_lists(coder, LISTS)
    assert batch["list"].tolist() == [0, 0, 0, 1, 1] and batch["rank"].tolist() == [2, 1, 0, 1, 0]
    p = mean_log_p(student, batch).detach()
    ranks = ((0, 1, 2), (3, 4))
    hinge = [sum(max(0.0, float(p[j] - p[i])) for n, i in enumerate(own) for j in own[n + 1 :]) for own in ranks]
    rrhf = sum(loss - float(p[own[0]]) for loss, own in zip(hinge, ranks, strict=True)) / 2
    assert lesson("rrhf", observed(student))(batch, 0.0).item() == pytest.approx(rrhf, rel=1e-4)
    assert sum(hinge) > 0
    pro = 0.0
    for own in ranks:
        K = len(own)
        for k in range(K - 1):
            gaps = [float(other - k) for other in range(k + 1, K)]
            scores = torch.stack([max(gaps) * p[own[k]], *(g * p[own[k + 1 + n]] for n, g in enumerate(gaps))])
            pro -= float(scores.log_softmax(0)[0])
        pro -= 0.05 * (K - 1) ** 2 * float(p[own[0]])
    assert lesson("pro", observed(student))(batch, 0.0).item() == pytest.approx(pro / 2, rel=1e-4)


def test_the_card_s_ranking_example():
    """p = (-1, -0.5), rewards (1, 0): RRHF 0.5, and the best one's cross-entropy 1 beside it."""

    class Fixed(torch.nn.Module):
        """Gives token 1 the log-probability -1 after 0, and token 2 -0.5."""

        def __init__(self) -> None:
            super().__init__()
            p = torch.tensor([1e-30, math.exp(-1.0), math.exp(-0.5), 1 - math.exp(-1.0) - math.exp(-0.5)])
            self.embed = torch.nn.Embedding.from_pretrained(p.clamp(min=1e-30).log().expand(4, 4).clone())
            self.head = torch.nn.Linear(4, 4, bias=False)
            self.head.weight = torch.nn.Parameter(torch.eye(4))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.embed(input_ids))

    from stillhouse.data.responses import pack_rows
    from stillhouse.objectives import LanguageHead

    model = Observed(Fixed())
    head = LanguageHead(model.tap("head", of="input"), model.parameter("head.weight"))
    batch = {**pack_rows([([0], [1]), ([0], [2])], 3), "list": torch.tensor([0, 0]), "rank": torch.tensor([1.0, 0.0])}
    assert 1 - math.exp(-1.0) - math.exp(-0.5) > 0
    assert RankedResponses(head)(batch, 0.0).item() == pytest.approx(0.5 + 1.0, rel=1e-5)


def test_pairs(pair):
    """DPO begins at ln 2 whatever the pair; the pairwise loss compares means per token."""
    first, student, coder = pair
    batch = best_and_worst(coder, LISTS)
    assert len(batch["input_ids"]) == 4
    assert lesson("dpo", observed(first), first=first)(batch, 0.0).item() == pytest.approx(math.log(2), abs=1e-6)
    assert lesson("dpo", observed(student), first=first)(batch, 0.0).item() != pytest.approx(math.log(2), abs=1e-4)
    better, worse = mean_log_p(student, batch).chunk(2)
    expected = -torch.nn.functional.logsigmoid(better - worse).mean().item()
    assert preferring_by_mean(head_of(observed(student)))(batch, 0.0).item() == pytest.approx(expected, rel=1e-4)
    assert lesson("pairwise", observed(student), weight=2.0)(batch, 0.0).item() == pytest.approx(2 * expected, rel=1e-4)


def test_a_reward_model_begins_without_an_opinion(materials, pair):
    """Equal rewards cost ln 2; a step of its loss puts the better one first."""
    _, _, coder = pair
    model = new_reward_model(str(materials.teacher), pad=coder.pad)
    rows = [coder.row("the cat", one) for one in (" sees a bird", " hears", " never", " and then the stone")]
    batch = coder.batch([(list(prompt) + list(said[:-1]), []) for prompt, said in rows])
    judge = Observed(model, options={"use_cache": False})
    term = RewardOrder(judge.output("logits"))
    value = term(batch, 0.0)
    assert value.item() == pytest.approx(math.log(2), abs=1e-7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        term(batch, 0.0).backward()
        optimizer.step()
    assert term(batch, 0.0).item() < math.log(2) - 1e-3
    with torch.no_grad():  # what is read is the last token before the padding
        alone = model(input_ids=batch["input_ids"][1:2, : int(batch["attention_mask"][1].sum())]).logits
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[1:2]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


class Echo:
    """Writes the same few responses to every prompt."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder

    def sample(self, prompts: Any, *, n: int, seed: int) -> list[list[Response]]:
        texts = [" sees a bird", " hears", " and then never", " old stone"][:n]
        return [[Response(tuple(self.coder.response(text)), text, True) for text in texts] for _ in prompts]


def policy_gradient(student: Any, first: Any, coder: Coder, reward: Any, **fields: Any) -> tuple[float, list[Tensor]]:
    source = RolloutSource(
        Echo(coder), coder, [{"prompt": "the cat"}], reward, prompts=1, group=4, advantage="leave-one-out"
    )
    student.zero_grad()
    value = lesson("reward", observed(student), first=first, ask="feedback", **fields)(next(source), 0.0)
    value.backward()
    return value.item(), [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in student.parameters()]


def test_the_policy_s_gradient_is_that_of_expected_reward_and_kl(pair):
    """Nothing where all rewards are equal at the start; else REINFORCE with leave-one-out, of whole responses."""
    model, moved_on, coder = pair
    first, start = (load_like(model) for _ in range(2))
    _, still = policy_gradient(start, first, coder, lambda text, record: 1.0)
    assert max(float(one.abs().max()) for one in still) < 1e-7
    rewards = {" sees a bird": 1.0, " hears": 0.0, " and then never": 0.25, " old stone": 0.5}
    _, found = policy_gradient(start, first, coder, lambda text, record: rewards[text])
    batch = coder.batch([coder.row("the cat", text) for text in rewards])
    length = batch["loss_mask"].sum(1)
    r = torch.tensor(list(rewards.values()), dtype=torch.float64)
    advantage = r - (r.sum() - r) / 3
    start.zero_grad()
    (-(advantage * mean_log_p(start, batch) * length).mean()).backward()
    for one, parameter in zip(found, start.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-5)
    # Away from the start the KL pulls back although all rewards are equal, the harder the larger beta is.
    small_pull, large_pull = (
        policy_gradient(moved_on, first, coder, lambda text, record: 1.0, beta=beta)[1] for beta in (0.1, 0.3)
    )
    assert max(float(one.abs().max()) for one in small_pull) > 1e-4
    for one, other in zip(small_pull, large_pull, strict=True):
        torch.testing.assert_close(3 * one, other, rtol=1e-3, atol=1e-6)


def load_like(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).requires_grad_(True)


def test_the_reward_model_judges_what_the_student_writes_to_the_pool(materials, tmp_path):
    system = small(materials, tmp_path, ask="feedback", learn="reward", asked=4, guesses=3)
    stages, _ = walked(system, tmp_path)
    assert list(stages) == ["seeds", "guesses", "opinions", "elicited", "reward", "student"]
    rollouts = stages["student"].source.sources[0]
    assert list(rollouts.source.data) == [{"prompt": p} for p in sorted_pool(stages)]
    assert rollouts.advantage == "leave-one-out" and rollouts.verifier.model.config.num_labels == 1
    batch = next(stages["student"].source)
    assert len(batch["input_ids"]) == 4 and torch.isfinite(batch["rewards"]).all() and "text" in batch


def sorted_pool(stages: dict[str, Any]) -> list[str]:
    """The prompts that guesses were asked for, in their order."""
    asked = [request.messages[0]["content"] for request in stages["guesses"].requests.values()]
    return list(dict.fromkeys(asked))


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_only_the_card_s_combinations(materials, tmp_path):
    with pytest.raises(ConfigError, match="learn=dpo does not go with ask=labelling; what does: sft"):
        walked(small(materials, tmp_path, ask="labelling", learn="dpo"), tmp_path)
    for (ask, _), fields in ElicitationLM.recipes.items():
        assert (fields.get("learn") or WAYS[ask][0]) in WAYS[ask]
    assert {ask for ask, _ in ElicitationLM.recipes} == set(WAYS) - {"none"} == set(ElicitationLM.meta.elicitation)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"ask": "feature", "teacher": "http://localhost:1/v1#big"}, ConfigError, "directory or hub id"),
        ({"teacher": "demo"}, ConfigError, "teacher=demo knows the problems of data=demo only"),
        ({"ask": "curation"}, ConfigError, "needs topics"),
        ({"labelled": 28}, DataError, "there are 27 problems"),
        ({"labelled": 27}, ConfigError, "no prompts besides the seeds"),
        ({"votes": 3, "teacher_temperature": 0.0}, ConfigError, "all answers are the same"),
    ],
)
def test_what_cannot_be_asked(fields, error, said, materials, tmp_path):
    with pytest.raises(error, match=said):
        walked(small(materials, tmp_path, **fields), tmp_path)


def test_features_need_one_tokenizer(materials, tmp_path):
    from stillhouse.models.tokenizers import train_bpe

    model, _ = load_causal_lm(str(materials.teacher))
    model.save_pretrained(tmp_path / "other")
    train_bpe(["0123456789 " * 9], vocab_size=262).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="different tokenizers"):
        walked(small(materials, tmp_path, ask="feature", teacher=str(tmp_path / "other")), tmp_path)


def test_prompts_of_one_s_own(materials, tmp_path, scripted):
    """A file without answers widens the pool; what is held out, a seed or there already is left out."""
    more = [{"prompt": f"never {word}"} for word in WORDS[:5]] + [{"prompt": one["prompt"]} for one in problems()]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, more)))
    system = small(materials, tmp_path, labelled=27, prompts=str(tmp_path / "more.jsonl"), answer_template="{prompt}")
    walked(system, tmp_path)
    assert [prompt for _, prompt in scripted.asked] == [one["prompt"] for one in more[:5]]


def test_a_teacher_behind_an_endpoint_is_asked_as_one_here_is(materials, tmp_path):
    from _endpoint import Endpoint, serving

    endpoint = Endpoint(write=lambda prompt: f"so # {prompt.split()[-1]}", models=("big",))
    with serving(endpoint):
        system = small(materials, tmp_path, ask="labelling", teacher=f"{endpoint.url}#big")
        _, left = walked(system, tmp_path)
        pairs = left["elicited"].json()["pairs"]
        assert len(pairs) == 8 and all(response == f"so # {prompt.split()[-1]}" for prompt, response in pairs)
        assert sorted(endpoint.prompts) == sorted(
            f"Solve this problem step by step, and end with its answer after #.\n\n{prompt}" for prompt, _ in pairs
        )
