"""DDK (card 105): the discrepancy factor, the mixture that obeys it, and what the system makes of both."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.schedule import Progress
from stillhouse.data.domain_mixture import (
    Discrepancy,
    DomainMixture,
    discrepancy_weights,
    excess_weights,
    smoothed_weights,
)
from stillhouse.data.domains import load_domains
from stillhouse.data.toy_domains import CHARACTERS, DOMAINS, LETTERS, ToyDomains, toy_domains
from stillhouse.data.windows import WindowSplit
from stillhouse.metrics.sequence_loss import mean_loss, perplexity
from stillhouse.models.character_tokenizer import character_tokenizer
from stillhouse.objectives.domain_weights import ExcessWeightedLoss
from stillhouse.objectives.language import head_of
from stillhouse.systems import get_system
from stillhouse.tasks import domains, language
from stillhouse.workflow import resume, run_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers

# -- the factor -----------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """Ratios (2, 1): r_0 = (0.7311, 0.2689); then psi -> (0.8808, 0.1192) and r_1 = (0.6904, 0.3096)."""
    ratio_D = torch.tensor([2.0, 1.0])
    first_D = discrepancy_weights(ratio_D)
    assert first_D.tolist() == pytest.approx([0.7311, 0.2689], abs=5e-5)
    assert smoothed_weights(first_D, ratio_D, alpha=1.0).tolist() == pytest.approx([0.8808, 0.1192], abs=5e-5)
    assert smoothed_weights(first_D, ratio_D, alpha=0.5).tolist() == pytest.approx([0.6904, 0.3096], abs=5e-5)
    rule = Discrepancy((3.0, 5.0))
    assert rule(rule(None, [6.0, 5.0]), [6.0, 5.0]) == pytest.approx([0.6904, 0.3096], abs=5e-5)


RATIOS = st.lists(st.floats(0.2, 9.0), min_size=2, max_size=6)


@settings(deadline=None, max_examples=50)
@given(RATIOS, st.floats(0, 1), st.floats(-5, 5), st.integers(0, 9))
def test_what_always_holds(ratios, alpha, constant, seed):
    """The sum is 1, nobody falls below the floor, and constants on all ratios change nothing."""
    ratio_D = torch.tensor(ratios, dtype=torch.float64)
    weight_D = torch.rand(len(ratios), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    weight_D /= weight_D.sum()
    found_D = smoothed_weights(weight_D, ratio_D, alpha=alpha)
    assert found_D.sum().item() == pytest.approx(1)
    assert found_D.min().item() >= (1 - alpha) / len(ratios) - 1e-12
    torch.testing.assert_close(smoothed_weights(weight_D, ratio_D + constant, alpha=alpha), found_D)
    plain = [float(w) * math.exp(float(r)) for w, r in zip(weight_D, ratio_D, strict=True)]
    expected = [alpha * one / sum(plain) + (1 - alpha) / len(ratios) for one in plain]
    assert found_D.tolist() == pytest.approx(expected)


def test_equal_ratios_stay_uniform_and_no_memory_of_the_gap_is_uniform():
    uniform_D = torch.full((4,), 0.25, dtype=torch.float64)
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(smoothed_weights(uniform_D, torch.full((4,), 1.7), alpha=alpha), uniform_D)
    torch.testing.assert_close(discrepancy_weights(torch.full((4,), 3.0)), uniform_D)
    skewed_D = torch.tensor([0.7, 0.1, 0.1, 0.1])
    torch.testing.assert_close(smoothed_weights(skewed_D, torch.tensor([1.0, 9, 2, 3]), alpha=0.0), uniform_D)


def test_the_fixed_point():
    """One domain behind by a constant ratio: r converges to the root of r = alpha psi(r) + (1 - alpha) / N."""
    N, alpha, gap = 3, 0.5, 0.8
    weight_D = discrepancy_weights(torch.tensor([1.0 + gap, 1.0, 1.0]))
    for _ in range(50):
        weight_D = smoothed_weights(weight_D, torch.tensor([1.0 + gap, 1.0, 1.0]), alpha=alpha)
    low, high = 1 / N, 1.0
    for _ in range(80):  # bisection on the first weight; the others are equal
        r = (low + high) / 2
        psi = r * math.exp(gap) / (r * math.exp(gap) + 1 - r)
        low, high = (r, high) if alpha * psi + (1 - alpha) / N > r else (low, r)
    assert weight_D[0].item() == pytest.approx(low, abs=1e-6)
    assert weight_D[1].item() == pytest.approx((1 - low) / 2, abs=1e-6)


def test_only_ratios_count_and_huge_ones_are_clipped():
    one, ten = (Discrepancy(tuple(scale * t for t in (2.0, 3.0, 4.0))) for scale in (1.0, 10.0))
    first, other = one(None, [4.0, 4.0, 4.0]), ten(None, [40.0, 40.0, 40.0])
    assert first == pytest.approx(other)
    assert one(first, [4.0, 3.0, 9.0]) == pytest.approx(ten(other, [40.0, 30.0, 90.0]))
    found = Discrepancy((1.0, 1.0), alpha=1.0)([0.5, 0.5], [1e30, 1.0])
    assert found == pytest.approx([1 / (1 + math.exp(-9)), 1 / (1 + math.exp(9))])


def test_without_smoothing_there_is_no_memory():
    rule = Discrepancy((1.0, 1.0), smooth=False)
    assert rule([0.99, 0.01], [1.0, 2.0]) == pytest.approx(discrepancy_weights(torch.tensor([1.0, 2.0])).tolist())


def test_doremi_s_rule_by_hand():
    """Xie et al., algorithm 1: multiplicative weights of the excess, clipped at 0, and a uniform share of c."""
    weight_D, excess_D = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, -2.0, 1.0])
    raised = [0.5 * math.exp(0.8), 0.3, 0.2 * math.exp(2.0)]
    found = excess_weights(weight_D, excess_D, step=2.0, smoothing=0.03)
    assert found.tolist() == pytest.approx([0.97 * one / sum(raised) + 0.01 for one in raised])
    assert found.sum().item() == pytest.approx(1)
    no_worse = excess_weights(weight_D, torch.full((3,), -1.0), smoothing=0.0)
    assert no_worse.tolist() == pytest.approx(weight_D.tolist())  # nobody behind: nothing moves
    assert excess_weights(weight_D, excess_D, smoothing=1.0).tolist() == pytest.approx([1 / 3] * 3)
    after = weight_D
    for _ in range(400):  # the floor lets a domain come back
        after = excess_weights(after, excess_D, smoothing=1e-3)
    assert after.min().item() >= 1e-3 / 3 - 1e-12 and after.argmax() == 2


def test_the_proxy_s_loss_and_weights_against_whole_logits():
    """Two steps: weights before the loss, per-token clipping, a domain that is missing keeps its excess."""
    proxy, reference = llama(0, 12), llama(1, 12)
    heads = head_of(Observed(proxy)), head_of(Observed(reference, frozen=True))
    term = ExcessWeightedLoss(*heads, domains=3, step=1.5, smoothing=0.1, vocab_size=12)
    random = torch.Generator().manual_seed(0)
    weights, excess, seen = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), []
    for rows in ([0, 1, 1, 2], [2, 0, 0, 0]):
        ids_BT, domain_B = torch.randint(0, 12, (4, 9), generator=random), torch.tensor(rows)
        found = term({"input_ids": ids_BT, "domain": domain_B}, Progress(0, 10))
        nats = [
            torch.nn.functional.cross_entropy(
                model(input_ids=ids_BT).logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
            ).view(4, 8)
            for model in (proxy, reference)
        ]
        clipped = (nats[0] - nats[1]).detach().clamp(min=0)
        assert 0 < (clipped == 0).float().mean() < 1
        for domain in set(rows):
            excess[domain] = clipped[domain_B == domain].double().mean()
        weights = excess_weights(weights, excess, step=1.5, smoothing=0.1)
        seen.append(weights)
        expected = sum(weights[domain] * nats[0][domain_B == domain].mean() for domain in set(rows))
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        mine, whole = (torch.autograd.grad(one, proxy.lm_head.weight)[0] for one in (found, expected))
        torch.testing.assert_close(mine.double(), whole.double(), atol=1e-6, rtol=1e-4)
    assert term.mean_weights == pytest.approx(torch.stack(seen).mean(0).tolist())
    with torch.no_grad():
        term({"input_ids": ids_BT, "domain": domain_B}, Progress(0, 10))
    assert float(term.steps) == 2  # what is only measured moves nothing
    assert {"weight", "excess", "total", "steps"} <= set(term.state_dict())


# -- the mixture ----------------------------------------------------------------------------------------------------


def numbered(sizes: list[int]) -> list[WindowSplit]:
    """Domain d's row n is (d, n)."""
    return [
        WindowSplit({"input_ids": torch.stack([torch.full((size,), number), torch.arange(size)], 1)})
        for number, size in enumerate(sizes)
    ]


def mixture(looks: list[list[float]] | None = None, **options: Any) -> DomainMixture:
    waiting = list(looks or [])
    values: dict[str, Any] = {"every": 5, "seed": 3}
    if looks is not None:
        values |= {"look": lambda: waiting.pop(0), "rule": Discrepancy((1.0, 1.0, 1.0))}
    return DomainMixture(numbered([4, 50, 200]), 40, [4.0, 50.0, 200.0], **{**values, **options})


def test_a_batch_says_whose_its_rows_are():
    for _ in range(5):
        batch = next(mixture())
        assert batch["input_ids"][:, 0].tolist() == batch["domain"].tolist()
        assert len(batch["input_ids"]) == 40


def test_shares_follow_the_weights():
    source = DomainMixture(numbered([50, 50, 50]), 64, [0.6, 0.3, 0.1], seed=1)
    count_D = torch.stack([torch.bincount(next(source)["domain"], minlength=3) for _ in range(100)]).sum(0)
    torch.testing.assert_close(count_D / count_D.sum(), torch.tensor([0.6, 0.3, 0.1]), atol=0.02, rtol=0)
    assert source.drawn == count_D.tolist()


def test_a_small_domain_is_gone_through_again_and_again():
    """Each pass has every row once, in another order."""
    source = DomainMixture(numbered([4, 4]), 8, [1.0, 1.0], seed=0)
    rows: list[list[int]] = [[], []]
    for _ in range(20):
        for domain, row in next(source)["input_ids"].tolist():
            rows[domain].append(row)
    passes = [own[start : start + 4] for own in rows for start in range(0, len(own) - 3, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len({tuple(one) for one in passes}) > 4
    assert source.epoch == sum(source.drawn) // 8 > 10


def test_the_first_interval_is_the_data_s_and_each_look_moves_the_next():
    looks = [[2.0, 1.0, 1.0], [2.0, 1.0, 1.5], [1.0, 1.0, 1.0]]
    source, rule = mixture(looks), Discrepancy((1.0, 1.0, 1.0))
    r = None
    for interval, seen in enumerate(looks):
        for _ in range(5):
            next(source)
            expected = [4 / 254, 50 / 254, 200 / 254] if interval == 0 else rule(r, seen)
            # after the last batch of the first interval the factor of the first look would hold
            assert source.history[-1]["weights"] == pytest.approx(expected)
        r = rule(r, seen)
        assert source.factor == pytest.approx(r)
    assert [line["batch"] for line in source.history] == [0, 5, 10]
    assert [line["student"] for line in source.history] == looks


def test_it_goes_on_where_it_stood():
    """State as JSON, in the middle of an interval: the same rows, looks and weights as without a stop."""
    looks = [[3.0, 1.0, 1.0], [2.0, 1.0, 1.5], [1.0, 2.0, 1.0]]
    whole = mixture(looks)
    expected = [next(whole) for _ in range(13)]
    first = mixture(looks)
    for _ in range(7):
        next(first)
    second = mixture(looks[2:])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in expected[7:]:
        found = next(second)
        assert all(torch.equal(found[key], batch[key]) for key in batch)
    assert second.state_dict() == whole.state_dict()


def test_processes_share_every_batch():
    whole, parts = mixture(), [mixture(), mixture()]
    for rank, part in enumerate(parts):
        part.shard = (rank, 2)
    for _ in range(6):
        rows = sorted(next(whole)["input_ids"].tolist())
        assert sorted(row for part in parts for row in next(part)["input_ids"].tolist()) == rows


# -- domains --------------------------------------------------------------------------------------------------------


def test_domains_from_folders_names_and_columns(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "a.txt").write_text("x = 1\fy = 2")
    (folder / "prose.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n{"text": "a bird"}\n')
    found = load_domains(str(folder))
    assert {name: text.documents["text"][:] for name, text in found.items()} == {
        "code": ["x = 1", "y = 2"],
        "prose": ["a cat", "a dog", "a bird"],
    }
    named = load_domains(f"p={folder / 'prose.jsonl'},c={folder / 'code'}")
    assert [len(text.documents) for text in named.values()] == [3, 2] and list(named) == ["p", "c"]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n}", "from": "ab"[n % 3 == 0]}) + "\n" for n in range(7))
    )
    by_field = load_domains(str(tmp_path / "rows.jsonl"), domain_field="from")
    assert by_field["b"].documents["text"][:] == ["t0", "t3", "t6"] and len(by_field["a"].documents) == 4
    assert by_field["a"].fingerprint != by_field["b"].fingerprint


def test_bad_domains(tmp_path):
    with pytest.raises(DataError, match="no folder; give one"):
        load_domains(str(tmp_path / "none"))
    with pytest.raises(DataError, match="no sub-folder and no data file"):
        load_domains(str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"one domain only \(a\)"):
        load_domains(str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="two domains are called 'a'"):
        load_domains(str(tmp_path))
    with pytest.raises(DataError, match="a name of its own"):
        load_domains("x=one,x=two")


def test_the_embedded_domains():
    """Fixed by the recipe; sums are right; the third letter back decides in `weave` and in no easy domain."""
    made = toy_domains(ToyDomains(documents=400))
    assert made == toy_domains(ToyDomains(documents=400)) and tuple(made) == DOMAINS
    assert [len(texts) for texts in made.values()] == [180, 180, 28, 12]
    assert {len(text) for texts in made.values() for text in texts} == {31}
    assert set("".join(text for texts in made.values() for text in texts)) <= set(CHARACTERS)
    for text in made["sums"]:
        for part in text.split()[:-1]:
            left, _, right = part.partition("=")
            assert sum(map(int, left.split("+"))) % 10 == int(right)
    other = toy_domains(ToyDomains(documents=400, draw=1))
    assert not set(made["weave"]) & set(other["weave"])
    even = toy_domains(ToyDomains(documents=6000, shares=(0.2, 0.2, 0.4, 0.2)))
    gain = {name: _entropy(even[name], 1) - _entropy(even[name], 3) for name in ("drill", "march", "weave")}
    assert gain["weave"] > 0.5 > 0.2 > max(gain["drill"], gain["march"])


def _entropy(texts: list[str], order: int) -> float:
    """Of the next letter after ``order`` letters, in nats, as counted."""
    counts: dict[str, dict[str, int]] = {}
    for text in texts:
        for place in range(order, len(text)):
            row = counts.setdefault(text[place - order : place], dict.fromkeys(LETTERS, 0))
            row[text[place]] += 1
    total = sum(sum(row.values()) for row in counts.values())
    return -sum(n * math.log(n / sum(row.values())) for row in counts.values() for n in row.values() if n) / total


def test_characters_are_tokens():
    tokenizer = character_tokenizer("ab+ ")
    assert tokenizer("a+ b").input_ids == [0, 2, 3, 1] and tokenizer.decode([0, 2, 3, 1]) == "a+ b"
    assert tokenizer("az").input_ids == [0, tokenizer.eos_token_id] == [0, 4]


# -- the system -----------------------------------------------------------------------------------------------------


def llama(seed: int, vocab_size: int, width: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.mark.parametrize("direction", ["forward-kl", "reverse-kl"])
def test_the_loss(monkeypatch, direction):
    """Cross-entropy + gamma KL at the temperature, as the paper has it: no T^2; with the teacher first or second."""
    student, teacher = llama(0, 12), llama(1, 12)

    class Stub:
        vocab_size = 12

        def observed_teacher(self) -> Observed:
            return Observed(teacher, frozen=True)

        def train(self, name: str, objective: Any, source: Any) -> Any:
            return objective(Observed(student))

    class Domains:
        task, names = Stub(), ["a", "b"]

        def remembering(self, stage: Any) -> Any:
            return stage

    def prepare(*_: Any) -> Any:
        return Domains()
        yield

    monkeypatch.setattr(domains.DomainTask, "prepare", staticmethod(prepare))
    values = {"gamma": 0.3, "temperature": 2.0, "divergence": direction, "mixture": "uniform"}
    objective: Any = next(get_system("ddk").make(teacher="x", data="y", **values).stages(None))  # type: ignore[arg-type]
    ids_BT = torch.randint(0, 12, (2, 9), generator=torch.Generator().manual_seed(0))
    found = objective({"input_ids": ids_BT}, Progress(0, 10))
    z_s, z_t = (model(input_ids=ids_BT).logits[:, :-1] for model in (student, teacher))
    label = torch.nn.functional.cross_entropy(z_s.flatten(0, 1), ids_BT[:, 1:].flatten())
    log_q, log_p = (z_s / 2).log_softmax(-1), (z_t / 2).log_softmax(-1)
    first, second = (log_p, log_q) if direction == "forward-kl" else (log_q, log_p)
    kl = (first.exp() * (first - second)).sum(-1).mean()
    assert found.item() == pytest.approx((label + 0.3 * kl).item(), rel=1e-5)
    assert kl > 0.1


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddk")
    tokenizer = character_tokenizer(CHARACTERS)
    llama(1, len(tokenizer), 16).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, texts in toy_domains(ToyDomains(documents=160, shares=(0.4, 0.3, 0.2, 0.1))).items():
        (folder / "text" / name).mkdir(parents=True)
        (folder / "text" / name / "a.txt").write_text("\f".join(texts))
    return folder


def run(materials: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    monkeypatch.setattr(language, "tokens_per_second", lambda *_: 1.0)
    common = {"window": 16, "steps": 12, "batch_size": 8, "validation": 0.2, "selection": 0.2, "trackers": []}
    mine = {"teacher": str(materials / "teacher"), "data": str(materials / "text"), "student": "layers=1"}
    return run_system("ddk", {**common, **mine, "lr": 1e-2, "interval": 4, **values}, output=output, quiet=True)


def test_the_system_draws_by_the_gap(materials, tmp_path, monkeypatch):
    """The course is what the rule makes of the perplexities that were seen, and the first of them is the student's."""
    done = run(materials, tmp_path / "run", monkeypatch)
    left = done.artifacts["student"].json(domains.COURSE)
    teacher = done.artifacts["teacher-perplexities"].json()
    rule, r = Discrepancy(tuple(teacher)), None
    assert [line["step"] for line in left["course"]] == [0, 4, 8] and sum(left["drawn"]) == 12 * 8
    for number, line in enumerate(left["course"]):
        r = rule(r, line["student"])
        if number:
            assert line["weights"] == pytest.approx(r)
    course = left["course"]
    assert course[0]["student"] != course[1]["student"] != course[2]["student"]
    windows = [row["windows"] for row in done.artifacts["domains"].table().rows]
    assert course[0]["weights"] == pytest.approx([one / sum(windows) for one in windows])
    assert {file.name for file in done.artifacts["domains"].path.glob("*.svg")} == {
        "student-weights.svg",
        "student-perplexities.svg",
    }
    row = done.artifacts["domains"].table().row("weave")
    assert row["student/ratio"] == pytest.approx(row["student"] / row["teacher"])
    assert done.artifacts["domains"].metrics["student/worst_ratio"] == max(
        one["student/ratio"] for one in done.artifacts["domains"].table().rows
    )
    assert "student-weights" in done.report.read_text() or "student weights" in done.report.read_text()


def test_how_much_the_weights_moved():
    """Of the intervals that obey the rule; the first is drawn as the data is."""
    course = [{"weights": weights} for weights in ([0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.4])]
    found = domains.changes(course)
    assert found["weight_change"] == pytest.approx((0.4 + 0.2) / 2)
    assert found["weight_spread"] == pytest.approx(0.1)
    assert domains.changes(course[:2]) == domains.changes([]) == {"weight_change": 0.0, "weight_spread": 0.0}


def test_a_fixed_mixture_looks_at_nobody(materials, tmp_path, monkeypatch):
    done = run(materials, tmp_path / "run", monkeypatch, mixture="uniform", gamma=0.0)
    left = done.artifacts["student"].json(domains.COURSE)
    assert left["course"] == [] and "teacher-perplexities" not in done.artifacts
    assert min(left["drawn"]) > 0.5 * 12 * 8 / 4
    assert done.artifacts["domains"].metrics["student/weight_change"] == 0


@pytest.mark.slow
def test_doremi_s_mixture_is_the_mean_of_its_proxy_s_weights_and_survives_a_kill(materials, tmp_path, monkeypatch):
    """The student reads by it from the first step on; nobody looks at the student meanwhile."""
    monkeypatch.setattr(language, "tokens_per_second", lambda *_: 1.0)
    values = {"window": 16, "steps": 30, "batch_size": 16, "validation": 0.2, "selection": 0.2, "trackers": []}
    values |= {"teacher": str(materials / "teacher"), "data": str(materials / "text"), "student": "layers=1"}
    values |= {"lr": 1e-2, "mixture": "doremi", "doremi_step": 5.0}
    done = run_system("ddk", values, output=tmp_path / "run", quiet=True)
    weights = done.artifacts["proxy"].json(domains.WEIGHTS)
    assert sum(weights) == pytest.approx(1) and max(weights) > 1.2 * min(weights)
    left = done.artifacts["student"].json(domains.COURSE)
    drawn = torch.tensor(left["drawn"]) / sum(left["drawn"])
    assert left["course"] == [] and sum(left["drawn"]) == 480
    torch.testing.assert_close(drawn, torch.tensor(weights), atol=0.08, rtol=0)
    natural = torch.tensor([row["windows"] for row in done.artifacts["domains"].table().rows], dtype=torch.float)
    assert 2 * (drawn - torch.tensor(weights)).abs().max() < (drawn - natural / natural.sum()).abs().max()
    logged = [json.loads(line) for file in done.folder.glob("stages/*-proxy/metrics.jsonl") for line in file.open()]
    assert any("weight of sums" in str(line) for line in logged)
    helpers.run_and_kill("ddk", {**values, "checkpoint_minutes": 1e-9}, tmp_path / "killed", after=3)
    again = resume(tmp_path / "killed", quiet=True)
    assert again.artifacts["proxy"].json(domains.WEIGHTS) == weights
    one, other = (helpers.weights(each.artifacts["student"].path) for each in (again, done))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_same_model_has_a_ratio_of_one(materials):
    """Perplexities are per predicted token of all text of a domain, not means of windows' perplexities."""
    model = llama(1, 22, 16)
    rows = [{"input_ids": torch.randint(0, 22, (n, 9), generator=torch.Generator().manual_seed(n))} for n in (1, 3)]
    joined = [{"input_ids": torch.cat([row["input_ids"] for row in rows])}]
    assert mean_loss(model, rows, vocab_size=22) == pytest.approx(mean_loss(model, joined, vocab_size=22), rel=1e-5)
    assert perplexity(0.0) == 1.0 and math.isfinite(perplexity(1e9))


def test_bad_input(materials, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs its weights"):
        run(materials, tmp_path / "a", monkeypatch, teacher="http://localhost:9/v1#m")
    with pytest.raises(ConfigError, match="knows data=demo alone"):
        run(materials, tmp_path / "b", monkeypatch, teacher="demo")
    with pytest.raises(DataError, match="one domain only"):
        run(materials, tmp_path / "c", monkeypatch, data=str(materials / "text" / "sums"))
