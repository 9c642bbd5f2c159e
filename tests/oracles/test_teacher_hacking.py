"""Teacher hacking (card 019): distances of whole responses, the protocol's definitions, the detector, the sources."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch

from stillhouse.audits.hacking import (
    Course,
    departure,
    fell_below,
    fit_power_law,
    hacking,
    hacking_table,
    read_course,
)
from stillhouse.data.responses import pack_rows
from stillhouse.metrics.sequence_distance import sequence_js, sequence_kl
from stillhouse.models import new_causal_lm

V, LENGTH = 3, 3
SEQUENCES = [list(ids) for ids in itertools.product(range(V), repeat=LENGTH)]


def model(seed: int, spread: float = 0.8) -> Any:
    """A Llama over three tokens with opinions, or without any (``spread=0``)."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=spread or 0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    made = new_causal_lm(config, seed=seed).eval()
    if not spread:
        torch.nn.init.zeros_(made.get_output_embeddings().weight)
    return made


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return pack_rows([([1], row) for row in rows], 0)


@torch.no_grad()
def probabilities(of: Any) -> torch.Tensor:
    """Of all responses of three tokens, from nothing but the model's forward: (27)."""
    packed = batch(SEQUENCES)
    log_p = of(input_ids=packed["input_ids"]).logits[:, :-1].double().log_softmax(-1)
    return log_p.gather(-1, packed["input_ids"][:, 1:, None])[..., 0].sum(-1).exp()


# -- distances --------------------------------------------------------------------------------------------------------


def test_the_kl_of_responses_is_the_expected_sum_of_their_tokens():
    """Of a model without opinions all responses are equally likely, so that each of them once is the expectation."""
    plain, other = model(0, spread=0.0), model(1)
    p, q = probabilities(plain), probabilities(other)
    assert p == pytest.approx(torch.full((27,), 1 / 27).double())
    found = sequence_kl(plain, other, [batch(SEQUENCES[:10]), batch(SEQUENCES[10:])], vocab_size=V)
    assert found.mean == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert (found.responses, found.tokens) == (27, 81) and found.per_token == pytest.approx(found.mean / LENGTH)
    assert found.mean > 0.1


def test_the_js_of_responses_is_that_of_their_distributions():
    one, other = model(2), model(3)
    p, q = probabilities(one), probabilities(other)
    m = (p + q) / 2
    exact = float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    values = [sequence_js(one, other, [batch([ids])], [batch([ids])], vocab_size=V).mean for ids in SEQUENCES]
    assert float((m * torch.tensor(values).double()).sum()) == pytest.approx(exact, rel=1e-5)
    # Without the odds of what stands before, it would be the sum of the tokens' own divergences, which is larger.
    mixed = batch(SEQUENCES)
    with torch.no_grad():
        a, b = (x(input_ids=mixed["input_ids"]).logits[:, :-1].double().softmax(-1) for x in (one, other))
    half = (a + b) / 2
    tokens = ((a * (a / half).log()).sum(-1) + (b * (b / half).log()).sum(-1)).sum(-1) / 2
    assert float((m * tokens).sum()) > exact * 1.05


def test_js_is_symmetric_at_most_ln_2_and_zero_of_one_model():
    one, other = model(2, spread=1.0), model(3, spread=1.0)
    rows, more = [batch(SEQUENCES[:9])], [batch(SEQUENCES[9:18])]
    there = sequence_js(one, other, rows, more, vocab_size=V).mean
    back = sequence_js(other, one, more, rows, vocab_size=V).mean
    assert there == pytest.approx(back, rel=1e-6)
    values = [sequence_js(one, other, [batch([ids])], [batch([ids])], vocab_size=V).mean for ids in SEQUENCES]
    m = (probabilities(one) + probabilities(other)) / 2
    assert 0 < float((m * torch.tensor(values).double()).sum()) <= math.log(2)
    assert sequence_js(one, one, rows, more, vocab_size=V).mean == pytest.approx(0, abs=1e-6)


def test_a_student_that_is_the_teacher():
    """It has no distance to the teacher, and the teacher's to the oracle; the KL of the responses has a direction."""
    oracle, teacher = model(4), model(5)
    drawn = [batch(SEQUENCES)]
    assert sequence_kl(teacher, teacher, drawn, vocab_size=V).mean == pytest.approx(0, abs=1e-6)
    there, back = (sequence_kl(*pair, drawn, vocab_size=V).mean for pair in ((oracle, teacher), (teacher, oracle)))
    assert there > 0.01 and back > 0.01 and abs(there / back - 1) > 0.01


# -- what is hacking --------------------------------------------------------------------------------------------------


def kl(p: tuple[float, float], q: tuple[float, float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_one_step_from_the_oracle_to_the_teacher():
    """o = (.5, .5), t = (.7, .3): from u = 0 to 0.2 the proxy falls to zero and the golden distance rises."""
    path = [(place, 0.2 * place / 10) for place in range(11)]
    proxy = [(x, kl((0.7, 0.3), (0.5 + u, 0.5 - u))) for x, u in path]
    golden = [(x, kl((0.5, 0.5), (0.5 + u, 0.5 - u))) for x, u in path]
    assert golden[-1][1] == pytest.approx(-0.5 * math.log(1 - 4 * 0.2**2)) == pytest.approx(0.0872, abs=1e-4)
    assert proxy[-1][1] == pytest.approx(0)
    found = hacking(proxy[1:], golden[1:])
    assert found.hacked and found.best == 1 and found.proxy_change == -1
    honest = hacking(proxy[1:], proxy[1:])
    assert not honest.hacked and honest.rise == 0
    away = [(x, 1 - y) for x, y in proxy[1:]]
    for rising in (away, golden[1:]):  # a student that leaves both is not hacking: it unlearns
        left = hacking(rising, golden[1:])
        assert not left.hacked and left.rise > 0.02 and left.proxy_change > 0.02
    still = hacking([(x, 0.5) for x, _ in golden[1:]], golden[1:])
    assert still.hacked and still.proxy_change == 0  # a proxy that stagnates is enough


def test_the_detector_knows_a_power_law():
    law = [(float(e), 3 * e**-0.5) for e in range(1, 101)]
    fitted = fit_power_law(law)
    assert (fitted.scale, fitted.slope) == pytest.approx((3, -0.5))
    found = departure(law)
    assert found is not None and found.flagged is None and max(map(abs, found.residuals)) < 1e-9


@pytest.mark.parametrize("window", [0.1, 0.2, 0.3])
def test_the_detector_flags_a_floor(window):
    bent = [(float(e), 3 * e**-0.5 + 0.2) for e in range(1, 101)]
    found = departure(bent, window=window)
    assert found is not None and found.flagged is not None and 20 <= found.flagged < 90
    assert found.law.slope > -0.5
    assert departure(bent, window=window, tolerance=0.01).flagged < found.flagged
    steeper = [(x, y * math.exp(-((x / 40) ** 2))) for x, y in bent]  # faster than the law is no reason to worry
    assert departure(steeper, window=window).flagged is None


def test_a_flag_that_is_taken_back_is_none():
    law = [(float(e), 3 * e**-0.5 * (2 if e == 60 else 1)) for e in range(1, 101)]
    assert departure(law).flagged is None
    assert departure(law[:5]) is None  # too few to fit and to look
    with pytest.raises(ValueError, match="two points"):
        fit_power_law([(1.0, 0.0), (2.0, 1.0)])


def test_training_loss_below_the_proxy():
    proxy = [(10.0, 1.0), (20.0, 0.8), (30.0, 0.7)]
    assert fell_below([(5.0, 1.2), (15.0, 0.9), (25.0, 0.5)], proxy) == 30
    assert fell_below([(5.0, 0.9), (15.0, 0.7), (25.0, 0.5)], proxy) == 10
    assert fell_below([(5.0, 0.9), (15.0, 0.9), (25.0, 0.9)], proxy) is None
    assert fell_below([], proxy) is None


def test_the_course_of_a_stage_is_read_from_its_metrics(tmp_path):
    lines = [
        {"kind": "train", "step": 10, "player": "student", "terms": {"ForwardKL": {"value": 0.5, "weight": 1.0}}},
        {"kind": "eval", "step": 10, "metrics": {"proxy": 9.0, "golden": 2.0, "proxy_per_token": 0.9}},
        {"kind": "eval", "step": 10, "metrics": {"proxy": 1.0, "golden": 2.0, "proxy_per_token": 0.9}},  # resumed
        {"kind": "eval", "step": 20, "metrics": {"proxy": 0.5, "golden": 3.0, "proxy_per_token": 0.4}},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ev')
    course = read_course("student", file)
    assert course is not None and course.figures["proxy"] == [(10, 1.0), (20, 0.5)]
    (row,) = hacking_table([course]).rows
    assert row["hacked"] == 1 and row["golden_rise"] == pytest.approx(0.5) and row["overfit"] == 10
    assert "slope" not in row  # two evaluations are no curve
    assert read_course("student", tmp_path / "none.jsonl") is None


def course(term: str = "ForwardKL", proxy: str = "proxy", **config: Any) -> Course:
    """The proxy falls to 1 nat a token; the training loss is below it from the start."""
    falling = [(10.0 * x, 1 + 1 / x) for x in range(1, 11)]
    return Course("student", {proxy: falling}, {term: [(x - 5, y / 2) for x, y in falling]}, config)


def test_the_training_loss_is_compared_where_it_is_what_the_proxy_is():
    as_usual = course(temperature=1.0, on_policy=0.0, text="data", sampling_temperature=1.0, top_p=1.0, beams=1)
    for known in (course(), as_usual, course(proxy="teacher_kl"), course("CrossEntropy", "selection_loss")):
        table = hacking_table([known])
        assert table.rows[0]["overfit"] == 10 and not any("not compared" in note for note in table.notes)
    # A cross-entropy has no temperature, and beside the student's own text it is on the data's.
    data = course("CrossEntropy", "selection_loss", temperature=2.0, on_policy=1.0, divergence="forward-kl")
    assert hacking_table([data]).rows[0]["overfit"] == 10


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (course(temperature=2.0), "temperature 2"),  # T^2 KL(p^(1/T) || q^(1/T)): below KL(p || q), or above it
        (course(proxy="teacher_kl", temperature=0.5), "temperature 0.5"),
        (course(on_policy=0.3), "the student wrote"),
        (course("CrossEntropy", "selection_loss", on_policy=1.0, divergence="labels"), "the student wrote"),
        (course(proxy="teacher_kl", text="teacher"), "the teacher wrote"),
        (course("CrossEntropy", "selection_loss", text="teacher", divergence="labels"), "the teacher wrote"),
        (course(sampling_temperature=0.0), "not drawn"),
        (course(beams=4), "not drawn"),
        (course("ReverseKL"), "no term ForwardKL"),
    ],
)
def test_a_training_loss_that_is_something_else_is_not_compared_and_that_is_said(given, why):
    table = hacking_table([given])
    assert "overfit" not in table.rows[0] and given.comparable == ()
    (note,) = (note for note in table.notes if "not compared" in note)
    assert why in note


def test_what_the_stage_was_configured_with_is_read_beside_its_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    line = {"kind": "eval", "step": 10, "metrics": {"proxy": 1.0}}
    file.write_text(json.dumps(line) + "\n")
    (tmp_path / "stage.json").write_text(json.dumps({"name": "student", "plan": {"config": {"temperature": 3.0}}}))
    found = read_course("student", file)
    assert found is not None and found.config == {"temperature": 3.0}


def test_without_a_distance_the_loss_stands_in_and_it_says_so():
    loss = [(float(x), 2 + 1 / x) for x in range(1, 11)]
    train = [(x - 0.5, y - 0.5) for x, y in loss]
    course = Course("student", {"selection_loss": loss, "perplexity": loss}, {"CrossEntropy": train})
    table = hacking_table([course])
    assert course.proxy == "selection_loss" and table.rows[0]["overfit"] == 1
    assert any("stand-in" in note for note in table.notes)
    assert hacking_table([Course("x", {"perplexity": loss}, {})]).rows == []


# -- whose text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The embedded task with three models that have learnt nothing."""
    from stillhouse.core.run import Run
    from stillhouse.data.responses import Coder
    from stillhouse.systems import get_system
    from stillhouse.tasks.oracle_language import OracleLanguage, oracle_task
    from stillhouse.tasks.policies import Policies

    system = get_system("teacher-hacking").make(batch_size=4, steps=8)
    run = Run(tmp_path_factory.mktemp("hacking"), quiet=True)
    generator = oracle_task(system, run, OracleLanguage(prompts=40, selection=4, validation=8))
    with pytest.raises(StopIteration) as done:
        next(generator)
    task = done.value.value
    return system, task, Policies(system, task, Coder(task.tokenizer), task.batches())


def test_prompts_and_responses_of_a_fixed_budget(parts):
    from stillhouse.base.errors import ConfigError
    from stillhouse.tasks.teacher_hacking import with_prompts

    _, task, _ = parts
    few, many = with_prompts(task, 10, 4, times=3), with_prompts(task, 10, 12)
    assert len(few.windows.train) == len(many.windows.train) == 12
    starts = [row[:4].tolist() for row in few.windows.train[:]["input_ids"]]
    assert len({tuple(start) for start in starts}) == 4 and starts[0] == starts[2] != starts[3]
    assert torch.equal(many.windows.train[0]["input_ids"], task.windows.train[10]["input_ids"])
    assert few.windows.fingerprint != many.windows.fingerprint != task.windows.fingerprint
    with pytest.raises(ConfigError, match="oracle_texts"):
        with_prompts(task, 40, None)


def test_fixed_and_fresh_text_have_the_same_prompts_and_only_the_fresh_changes(parts):
    """So that in the first pass both are draws of one distribution."""
    from dataclasses import replace

    from stillhouse.core.observed import Observed
    from stillhouse.tasks.teacher_hacking import fresh_text, with_prompts

    _, task, policies = parts
    small = replace(policies, task=with_prompts(task, 0, 4))
    student = Observed(task.new_student(), name="student")

    def epochs(**how: Any) -> list[list[list[int]]]:
        source = fresh_text(replace(small, texts=small.task.batches()), student, **how)
        return [sorted(next(source)["input_ids"].tolist()) for _ in range(3)]

    fixed, fresh, own = (epochs(fresh=f, on_policy=o) for f, o in ((False, 0.0), (True, 0.0), (False, 1.0)))
    prompts = [[row[:4] for row in batch] for batch in fixed]
    assert fixed[0] == fixed[1] == fixed[2]
    assert fresh[0] != fresh[1] and own[0] != own[1] and fresh[0] != own[0]
    assert [[row[:4] for row in batch] for batch in fresh] == prompts == [[row[:4] for row in batch] for batch in own]
    assert fresh == epochs(fresh=True, on_policy=0.0)


def test_a_mixture_takes_turns(parts):
    from stillhouse.core.observed import Observed
    from stillhouse.tasks.teacher_hacking import fresh_text

    _, task, policies = parts
    source = fresh_text(policies, Observed(task.new_student(), name="student"), fresh=False, on_policy=0.5)
    own = [float(next(source)["own"][0]) for _ in range(24)]
    assert 4 < sum(own) < 20


def test_both_distances_are_one_where_the_teacher_is_the_oracle(parts):
    """Hacking is then impossible; and of a teacher that is not they differ."""
    from dataclasses import replace

    from stillhouse.tasks.oracle_language import OracleLanguage, oracle_network
    from stillhouse.tasks.teacher_hacking import Protocol

    _, task, policies = parts
    oracle, student = oracle_network(OracleLanguage(), seed=0), task.new_student()
    honest = Protocol(replace(policies, task=replace(task, teacher=oracle)), oracle, 8).distances(student)
    assert honest["proxy"] == honest["golden"] > 0.1
    found = Protocol(policies, oracle, 8).distances(student)
    assert found["golden"] == honest["golden"] and abs(found["proxy"] / found["golden"] - 1) > 0.05


def test_the_oracle_has_opinions_that_depend_on_the_seed(parts):
    from stillhouse.tasks.oracle_language import OracleLanguage, oracle_network

    _, task, _ = parts
    ids = task.windows.validation[:]["input_ids"]
    with torch.no_grad():
        one, same, other = (
            oracle_network(OracleLanguage(), seed=seed)(input_ids=ids).logits.log_softmax(-1) for seed in (0, 0, 1)
        )
    assert torch.equal(one, same) and not torch.allclose(one, other)
    entropy = -(one.exp() * one).sum(-1).mean()
    assert 0.8 < float(entropy) < 2.3  # neither a rule nor noise, which is ln 13 = 2.56
