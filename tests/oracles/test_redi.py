"""REDI (card 029): the loss, its limits, what it reads, and how its traces are made."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import pack_rows
from stillhouse.losses.preference import dpo_loss, redi_loss, simpo_loss
from stillhouse.metrics.reasoning import collapsed, pass_at_k
from stillhouse.objectives import TokenCrossEntropy
from stillhouse.objectives.responses import PairLoss, Pairs
from stillhouse.systems import get_system
from stillhouse.tasks.traces import Said, TracePairs, both, write_traces

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("faults", "systems")]
import helpers
from _endpoint import Endpoint, serving, status
from table_lm import Table, head

V = 7


def table(seed: int = 0) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RIGHT = [([1, 2], [3, 4, 0]), ([2], [5, 0])]
WRONG = [([1, 2], [4, 4, 6, 0]), ([2], [1, 0])]


def loss_and_gradient(loss: Any, rows: Any = None, z: Tensor | None = None, **more: Any) -> tuple[float, Tensor]:
    model = Table(table() if z is None else z)
    term = PairLoss(head(Observed(model)), loss, **more)
    value = term(pack_rows(rows or RIGHT + WRONG, 0), 0.0)
    value.backward()
    return value.item(), model.embed.weight.grad


def redi(alpha: float, gamma_n: float = 0.0) -> Any:
    return lambda p: redi_loss(p.logp_w, p.length_w, p.logp_l, p.length_l, alpha=alpha, gamma_n=gamma_n)


def tensor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


# -- the loss -------------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    assert redi_loss(tensor(-2.0), tensor(4), tensor(-3.0), tensor(6), alpha=0.8).item() == pytest.approx(0.1)
    faded = redi_loss(tensor(-2.0), tensor(4), tensor(-3.0), tensor(6), alpha=0.8, gamma_n=2.0).item()
    assert faded == pytest.approx(0.5 - 0.4 * torch.exp(tensor(-1.0)).item())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_against_a_loop_over_tokens(alpha):
    """(p - onehot)/|y_w| at the tokens of the better response, alpha (onehot - p)/|y_l| at those of the worse."""
    z = table()
    log_p = z.log_softmax(-1)
    value, expected = 0.0, torch.zeros(V, V, dtype=torch.float64)
    for rows, sign in ((RIGHT, 1.0), (WRONG, -alpha)):
        for prompt, response in rows:
            whole = prompt + response
            for place in range(len(prompt), len(whole)):
                before, token = whole[place - 1], whole[place]
                weight = sign / len(response) / len(rows)
                value -= weight * log_p[before, token].item()
                gradient = log_p[before].exp()
                gradient[token] -= 1
                expected[before] += weight * gradient
    found, gradient = loss_and_gradient(redi(alpha))
    assert found == pytest.approx(value)
    torch.testing.assert_close(gradient, expected)


def test_alpha_0_is_the_length_normalised_likelihood_of_the_right_ones():
    _, gradient = loss_and_gradient(redi(0.0))
    model = Table(table())
    total = torch.zeros((), dtype=torch.float64)
    for row in RIGHT:  # a batch of one row: its mean over tokens is the normalised likelihood
        total = total + TokenCrossEntropy(head(Observed(model)))(pack_rows([row], 0), 0.0) / len(RIGHT)
    total.backward()
    torch.testing.assert_close(gradient, model.embed.weight.grad)
    model = Table(table())
    TokenCrossEntropy(head(Observed(model)))(pack_rows(RIGHT, 0), 0.0).backward()
    assert not torch.allclose(gradient, model.embed.weight.grad)  # plain SFT weighs long responses more


def test_alpha_1_is_antisymmetric():
    one, two = loss_and_gradient(redi(1.0)), loss_and_gradient(redi(1.0), WRONG + RIGHT)
    assert one[0] == pytest.approx(-two[0])
    torch.testing.assert_close(one[1], -two[1])
    lopsided = loss_and_gradient(redi(0.8))[1], loss_and_gradient(redi(0.8), WRONG + RIGHT)[1]
    assert not torch.allclose(lopsided[0], -lopsided[1])


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_simpo_tends_to_the_symmetric_loss(gamma):
    """grad SimPO / beta -> sigmoid(gamma) grad L_symm."""
    beta = 1e-4
    _, simpo = loss_and_gradient(
        lambda p: simpo_loss(p.logp_w, p.length_w, p.logp_l, p.length_l, beta=beta, gamma=gamma)
    )
    _, symmetric = loss_and_gradient(redi(1.0))
    wanted = torch.sigmoid(torch.tensor(gamma, dtype=torch.float64)) * symmetric
    assert ((simpo / beta - wanted).norm() / wanted.norm()).item() < 1e-3


def test_dpo():
    """At the reference it is log 2 and its gradient beta/2 that of the difference; it does not see a common factor."""
    z, beta = table(), 0.3
    reference = head(Observed(Table(z), frozen=True))

    def dpo(p: Pairs) -> Tensor:
        assert p.ref_w is not None and p.ref_l is not None
        return dpo_loss(p.logp_w, p.logp_l, p.ref_w, p.ref_l, beta=beta)

    value, gradient = loss_and_gradient(dpo, z=z, reference=reference)
    assert value == pytest.approx(torch.log(torch.tensor(2.0)).item())
    _, difference = loss_and_gradient(lambda p: p.logp_l - p.logp_w, z=z)
    torch.testing.assert_close(gradient, beta / 2 * difference)
    moved, _ = loss_and_gradient(dpo, z=table(5), reference=reference)
    assert moved != pytest.approx(value)


def test_prompts_and_padding_do_not_count():
    z = table()
    value, gradient = loss_and_gradient(redi(0.8), z=z)
    longer = [([5, 6, 1, 2], [3, 4, 0]), ([0, 3, 2], [5, 0]), *WRONG]  # the same last token of each prompt
    again, same = loss_and_gradient(redi(0.8), longer, z=z)
    assert again == pytest.approx(value)
    torch.testing.assert_close(same, gradient)
    wide = pack_rows(RIGHT + WRONG, 0)
    wide = {
        key: torch.nn.functional.pad(part, (0, 5), value=6 if key == "input_ids" else 0) for key, part in wide.items()
    }
    model = Table(z)
    assert PairLoss(head(Observed(model)), redi(0.8))(wide, 0.0).item() == pytest.approx(value)


def test_a_response_of_no_token_does_not_divide_by_zero():
    assert torch.isfinite(redi_loss(tensor(0.0), tensor(0), tensor(-1.0), tensor(1))).all()


def test_the_monitor_logs_mean_log_probabilities():
    model = Table(table())
    term = PairLoss(head(Observed(model)), redi(0.8))
    from stillhouse.core.observed import Turn

    (value,) = term.evaluate(Turn(term.signals()), pack_rows(RIGHT + WRONG, 0), Progress(0, 1))
    log_p = table().log_softmax(-1)
    chosen = (log_p[2, 3] + log_p[3, 4] + log_p[4, 0] + log_p[2, 5] + log_p[5, 0]) / 5
    assert float(value.extras["chosen_logp"]) == pytest.approx(chosen.item())
    assert float(value.extras["rejected_logp"]) != pytest.approx(chosen.item())


def test_collapse():
    assert collapsed((-0.1, -1.0), (-0.5, -3.0), (0.9, 0.2))
    assert not collapsed((-0.1, -0.2), (-0.5, -3.0), (0.9, 0.8))  # the right ones stayed
    assert not collapsed((-0.1, -1.0), (-0.5, -3.0), (0.9, 0.95))


def test_pass_at_k():
    from itertools import combinations

    right = [True, False, True, False, False]
    for k in (1, 2, 3, 5):
        draws = list(combinations(right, k))
        assert pass_at_k(2, 5, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(1, 2, 3)


# -- the asymmetry in training --------------------------------------------------------------------------------------


def descend(alpha: float, steps: int = 60) -> tuple[float, float]:
    """(chosen, rejected) log-probability per token after training a table whose right and wrong answers share a row."""
    model = Table(torch.zeros(V, V, dtype=torch.float64))
    term = PairLoss(head(Observed(model)), redi(alpha))
    batch = pack_rows([([1], [2, 0]), ([1], [3, 0])], 0)
    optimizer = torch.optim.SGD([model.embed.weight], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        term(batch, 0.0).backward()
        optimizer.step()
    log_p = model.embed.weight.detach().log_softmax(-1)
    return (log_p[1, 2] + log_p[2, 0]).item() / 2, (log_p[1, 3] + log_p[3, 0]).item() / 2


def test_alpha_orders_what_happens_to_both():
    found = {alpha: descend(alpha) for alpha in (0.0, 0.5, 1.0)}
    assert found[0.0][1] > found[0.5][1] > found[1.0][1]  # the stronger, the lower the wrong ones
    assert found[1.0][1] < found[0.0][1] - 1.0


# -- traces ---------------------------------------------------------------------------------------------------------


class Tokenizer:
    eos_token_id, pad_token_id, chat_template = 0, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(sign) % (V - 1) for sign in text]}


def fake_task(problems: list[dict[str, Any]]) -> Any:
    from stillhouse.data.responses import Coder
    from stillhouse.data.verifiers import ExactMatch

    return SimpleNamespace(
        coder=Coder(Tokenizer()),  # type: ignore[arg-type]
        train_problems=problems,
        verifier=ExactMatch(),
        puzzle=None,
        system=SimpleNamespace(seed=0, max_new_tokens=8, chat=None, trust_remote_code=False),
    )


def traces_of(problems: list[dict[str, Any]], folder: Path) -> tuple[Any, Any]:
    from stillhouse import Run

    task = fake_task(problems)
    stage = next(write_traces(task, "data", attempts=8, temperature=1.0, demo=None))  # type: ignore[arg-type]
    return task, Run(folder, quiet=True).execute([stage])["traces"]


PROBLEMS = [
    {"prompt": "2+2", "answer": "4", "traces": ["# 5", "# 4", "# 3", "so # 4"]},
    {"prompt": "1+1", "answer": "2", "traces": ["# 2"]},
    {"prompt": "9+9", "answer": "18", "traces": ["# 17"]},
]


def test_traces_are_verified_and_paired(tmp_path):
    import pyarrow.parquet as pq

    task, artifact = traces_of(PROBLEMS, tmp_path)
    records = pq.read_table(artifact.data_file()).to_pylist()
    assert [(r["right"], r["wrong"], r["accuracy"]) for r in records] == [
        ("# 4", "# 5", 0.5),
        ("# 2", None, 1.0),
        (None, "# 17", 0.0),
    ]
    pairs = TracePairs.read(task, artifact, max_prompt=10, max_response=10)
    assert len(pairs.right) == 2 and len(pairs.pairs) == 1
    batch = pairs.task.coder.pairs(pairs.pairs)
    assert batch["input_ids"].shape[0] == 2  # the right one, then the wrong one
    assert batch["input_ids"][0, -2] == 1 + ord("4") % (V - 1)
    with pytest.raises(DataError, match=r"2 of 3 have a right one, 2 a wrong one"):
        TracePairs.read(task, artifact, max_prompt=10, max_response=2)


def test_data_without_traces(tmp_path):
    with pytest.raises(DataError, match="'traces'"):
        traces_of([{"prompt": "a", "answer": "b"}], tmp_path)


def test_the_paper_s_values():
    made = get_system("redi").make(model="x", data="y")
    assert (made.alpha, made.lr, made.sft_lr, made.batch_size, made.sft_batch) == (0.8, 1e-6, 5e-5, 32, 128)
    assert (made.epochs, made.sft_epochs, made.warmup, made.weight_decay) == (1.0, 5.0, 0.1, 1e-4)
    assert (made.max_prompt, made.max_response, made.gamma_n) == (800, 19_000, 0.0)


# -- the judge ------------------------------------------------------------------------------------------------------


def test_a_trace_is_right_if_both_say_so():
    """Right: both. Wrong: not both, whatever the other says. Without a verdict it is neither."""
    assert [both(True, True), both(True, False), both(False, None), both(False, True)] == [True, False, False, False]
    assert both(True, None) is None
    said = Said("p", "4", ["a", "b", "c", "d"], [True, True, True, False], [None, False, True, None])
    assert (said.sorted()["right"], said.sorted()["wrong"]) == ("a", "d")
    dual = said.sorted(dual=True)
    assert (dual["right"], dual["wrong"]) == ("c", "b") and dual["accuracy"] == pytest.approx(1 / 3)


def system_for(judge: str | None, endpoint: str | None = None, teacher: str = "data") -> Any:
    return get_system("redi").make(model="x", data="y", teacher=teacher, judge=judge, judge_endpoint=endpoint)


def judged_traces(problems: list[dict[str, Any]], folder: Path, system: Any) -> Any:
    """The artifacts of a run of the stages in which traces are written and judged."""
    from stillhouse import Run

    run = Run(folder, quiet=True)
    task = fake_task(problems)
    task.run = run
    stages = system.traces(task, demo=None)
    made: dict[str, Any] = {}
    stage = next(stages)
    while "traces" not in made:
        made |= run.execute([stage])
        if stage.name != "traces":
            stage = stages.send(made[stage.name])
    return made


def labels(artifact: Any) -> list[tuple[str | None, str | None]]:
    import pyarrow.parquet as pq

    return [(row["right"], row["wrong"]) for row in pq.read_table(artifact.data_file()).to_pylist()]


def test_a_judge_at_an_endpoint(tmp_path, monkeypatch):
    """It is asked about what the verifier finds right, once; it overrules; babble is no verdict; a kill loses nothing.

    Of 2+2 the first right trace is overruled and so the first wrong one; of 1+1 there is no verdict.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    problems = [{**PROBLEMS[0], "traces": ["# 4", "so # 4", "# 5"]}, *PROBLEMS[1:]]

    def write(prompt: str) -> str:
        solution = prompt.rpartition("Solution:\n")[2]
        return {"# 4": '{"correct": false}', "so # 4": '```json\n{"correct": true}\n```'}.get(solution, "hard to say")

    with serving(Endpoint(write=write)) as endpoint:
        system = system_for("teacher", endpoint.url)
        made = judged_traces(problems, tmp_path, system)
        assert labels(made["traces"]) == [("so # 4", "# 4"), (None, None), (None, "# 17")]
        assert made["traces"].metrics == {"judged": 2, "overruled": 1, "unjudged": 1}
        prompts = [body["messages"][0]["content"] for body in endpoint.bodies]
        assert len(set(prompts)) == 3 and not any("# 5" in prompt or "# 17" in prompt for prompt in prompts)
        shown = next(prompt for prompt in prompts if prompt.endswith("so # 4"))
        assert "Problem:\n2+2\n" in shown and "Reference answer:\n4\n" in shown
        assert all(
            body["response_format"]["json_schema"]["schema"]["required"] == ["correct"] for body in endpoint.bodies
        )
        # With the stages gone, verdicts that were paid for are in the run's store; only failures are asked for again.
        before = len(endpoint.bodies)
        shutil.rmtree(tmp_path / "stages")
        judged_traces(problems, tmp_path, system)
        assert {body["messages"][0]["content"] for body in endpoint.bodies[before:]} == {
            prompt for prompt in prompts if prompt.endswith("# 2")
        }


def test_verdicts_that_the_data_has(tmp_path):
    problems = [{**PROBLEMS[0], "judged": [True, False, True, True]}, {**PROBLEMS[1], "judged": [True]}]
    made = judged_traces(problems, tmp_path / "good", system_for("data"))
    assert labels(made["traces"]) == [("so # 4", "# 5"), ("# 2", None)]
    assert made["traces"].metrics == {"judged": 3, "overruled": 1, "unjudged": 0}
    with pytest.raises(DataError, match="'judged'"):
        judged_traces(PROBLEMS, tmp_path / "bad", system_for("data"))


def test_a_judge_in_this_process(tmp_path):
    """A tiny model babbles: it gives no verdict, so no trace is right, and what the verifier finds wrong stays so."""
    materials = helpers.make_materials(tmp_path)
    made = judged_traces(PROBLEMS, tmp_path / "run", system_for(str(materials.teacher)))
    assert labels(made["traces"]) == [(None, "# 5"), (None, None), (None, "# 17")]
    assert made["traces"].metrics == {"judged": 0, "overruled": 0, "unjudged": 3}


@pytest.mark.parametrize(
    ("system", "said"),
    [
        (lambda: system_for(None, "http://localhost:1/v1"), "judge_endpoint needs judge=MODEL"),
        (lambda: system_for("data", teacher="my-teacher"), "set teacher=data, or name a judge"),
    ],
)
def test_judges_that_cannot_be(system, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        judged_traces(PROBLEMS, tmp_path, system())


def test_traces_of_a_server(tmp_path, monkeypatch):
    """Each problem is one request; the key is that of ``api_key_env``; a busy server is asked again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", "secret")
    asked = {str(fake_task([]).coder.prompt(problem["prompt"])): problem["answer"] for problem in PROBLEMS}

    def busy(prompt: str, nth: int) -> Any:
        return status(503, Retry_After_Ms="10") if asked[prompt] == "2" and nth == 1 else None

    with serving(
        Endpoint(busy, write=lambda prompt: f"# {asked[prompt]}" if asked[prompt] != "4" else "# 9")
    ) as endpoint:
        system = get_system("redi").make(
            model="x", data="y", teacher=f"{endpoint.url}#writer", attempts=3, api_key_env="MY_KEY", concurrency=2
        )
        made = judged_traces(PROBLEMS, tmp_path, system)
    assert labels(made["traces"]) == [(None, "# 9"), ("# 2", None), ("# 18", None)]
    assert len(endpoint.bodies) == 4 and set(endpoint.keys) == {"Bearer secret"}
    seeds = {asked[str(body["prompt"])]: body["seed"] for body in endpoint.bodies}
    assert seeds == {"4": 0, "2": 1, "18": 2}  # those of the problems, in whatever order they were written
    assert {(body["n"], body["model"], body["temperature"]) for body in endpoint.bodies} == {(3, "writer", 0.6)}
