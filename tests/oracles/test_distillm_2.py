"""DistiLLM-2: skews that differ from row to row, the gap they follow, the measured anchor, and the sides' weights."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse import Observed
from stillhouse.base.errors import ConfigError
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import pack_rows
from stillhouse.losses.divergences import SkewedForwardKL, SkewedReverseKL
from stillhouse.losses.skewed_rows import SkewedByRow, linear_skewed_kl, skew_for_gap
from stillhouse.losses.token_logprobs import Head
from stillhouse.models import new_causal_lm
from stillhouse.objectives.language import head_of
from stillhouse.objectives.skew_curriculum import CurriculumSkew
from stillhouse.systems import get_system

FIXED = {"skew-forward": SkewedForwardKL, "skew-reverse": SkewedReverseKL}


def tiny(seed: int) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.8,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return new_causal_lm(config, seed=seed)


STUDENT, TEACHER = tiny(2), tiny(3)


def rows(own: float) -> dict[str, Any]:
    batch = pack_rows([([1, 2], [3, 4, 5]), ([6], [7, 8]), ([9, 1, 2], [3])], 0)
    return {**batch, "own": torch.full((3,), own), "given": torch.full((3,), 1 - own)}


def gaps(batch: dict[str, Any]) -> Tensor:
    """p - q of each row, by hand: geometric means over the response."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True):
        means = []
        for model in (TEACHER, STUDENT):
            with torch.no_grad():
                log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            means.append(log_p[mask[1:].bool()].mean().exp())
        found.append(means[0] - means[1])
    return torch.stack(found)


def term(direction: str = "skew-forward", **options: Any) -> CurriculumSkew:
    heads = head_of(Observed(STUDENT)), head_of(Observed(TEACHER, frozen=True))
    options = {"own": False, "rows": "given", **options}
    return CurriculumSkew(*heads, direction, **options)  # type: ignore[arg-type]


def by_hand(batch: dict[str, Any], direction: str, skew_B: Tensor) -> float:
    total, tokens = 0.0, 0
    for ids, mask, skew in zip(batch["input_ids"], batch["loss_mask"], skew_B.tolist(), strict=True):
        with torch.no_grad():
            q, p = (model(input_ids=ids[None]).logits[0, :-1] for model in (STUDENT, TEACHER))
        loss = FIXED[direction](alpha=skew)(q, p)[mask[1:].bool()]
        total, tokens = total + float(loss.sum()), tokens + len(loss)
    return total / tokens


# -- one skew a row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", FIXED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_row_has_the_skewed_kl_of_its_skew(direction, temperature):
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    skew = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    found = SkewedByRow(skew=skew, direction=direction, temperature=temperature)
    for row, alpha in enumerate(skew.tolist()):
        one = FIXED[direction](alpha=alpha, temperature=temperature)
        value, grad = one.value_and_grad(q[row : row + 1], p[row : row + 1])
        torch.testing.assert_close(found(q, p)[row : row + 1], value)
        torch.testing.assert_close(found.value_and_grad(q, p)[1][row : row + 1], grad)


@pytest.mark.parametrize("direction", FIXED)
def test_the_fused_pass_keeps_rows_and_skews_together(direction, monkeypatch):
    """With rows left out, several chunks and several blocks: the value and gradients of the plain formula."""
    module = sys.modules["stillhouse.losses.linear_divergence"]  # the package has a function of that name
    monkeypatch.setattr(module, "default_tokens", lambda *_: (3, 2))
    generator = torch.Generator().manual_seed(1)
    hidden, head, other, teacher = (torch.randn(n, d, generator=generator) for n, d in ((8, 4), (9, 4), (8, 5), (9, 5)))
    skew, weight = torch.rand(8, generator=generator) * 0.8 + 0.1, torch.tensor([1.0, 0, 2, 1, 1, 0, 0.5, 1])
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    options: dict[str, Any] = {"skew_N": skew, "direction": direction, "weight_N": weight}
    found = linear_skewed_kl(hidden, Head(head), other, Head(teacher), **options)
    plain = (SkewedByRow(skew=skew, direction=direction)(hidden @ head.T, other @ teacher.T) * weight).sum()
    expected = plain / weight.sum()
    torch.testing.assert_close(found, expected)
    for one, two in zip(*(torch.autograd.grad(loss, [hidden, head]) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


# -- the skew a gap asks for ----------------------------------------------------------------------------------------


def test_the_skew_levels_the_first_order_loss():
    anchor, gap = 0.2, torch.tensor([0.195, 0.19, 0.2])
    alpha = skew_for_gap(gap, anchor)
    torch.testing.assert_close((1 - alpha) * gap, torch.full((3,), 0.9 * anchor))
    # harder: the whole skew; much easier, no gap, the wrong way: the least
    assert skew_for_gap(torch.tensor([0.3, 9.0]), anchor).tolist() == pytest.approx([0.1, 0.1])
    assert skew_for_gap(torch.tensor([0.1, 0.0, -0.3]), anchor).tolist() == pytest.approx([0.01] * 3)
    assert skew_for_gap(torch.tensor([0.1]), -0.1).tolist() == pytest.approx([0.1])  # harder than an easy average


def test_the_approximation_is_first_order():
    """log p / (a p + (1 - a) q) against (1 - a)(p - q): their difference falls with the square of 1 - p and 1 - q."""
    alpha, errors = 0.1, []
    for far in (0.1, 0.05, 0.025):
        p, q = torch.tensor(1 - far / 2, dtype=torch.float64), torch.tensor(1 - far, dtype=torch.float64)
        errors.append(float((p / (alpha * p + (1 - alpha) * q)).log() - (1 - alpha) * (p - q)))
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.1) and errors[2] / errors[1] == pytest.approx(
        1 / 4, rel=0.1
    )


# -- the term -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", FIXED)
def test_first_the_skew_is_fixed_and_the_mean_gap_is_measured(direction):
    one, batch = term(direction, until=0.5), rows(0.0)
    value = float(one(batch, 0.0).detach())
    assert value == pytest.approx(by_hand(batch, direction, torch.full((3,), 0.1)), rel=1e-4)
    one(batch, 0.4)
    assert one.measured.tolist() == pytest.approx([2 * float(gaps(batch).sum()), 6])
    one.eval()
    one(batch, 0.0)
    assert one.measured[1] == 6  # not by looking


def test_then_it_follows_the_gap_against_the_mean_gap():
    batch = rows(0.0)
    gap = gaps(batch)
    one = term(until=0.5)
    anchor = float(gap.abs().median()) * 0.97
    one.measured.copy_(torch.tensor([anchor * 10, 10.0]))
    skew = skew_for_gap(gap, anchor)
    assert len(skew.unique()) > 1
    assert float(one(batch, 0.5).detach()) == pytest.approx(by_hand(batch, "skew-forward", skew), rel=1e-4)
    assert one.measured.tolist() == pytest.approx([anchor * 10, 10.0])  # it is not measured any more


def test_on_its_own_text_the_students_side_is_the_likelier():
    batch = rows(1.0)
    one = term("skew-reverse", own=True, rows="own", until=0.5)
    one(batch, 0.0)
    assert float(one.measured[0]) == pytest.approx(-float(gaps(batch).sum()))
    anchor = float((-gaps(batch)).clamp(min=0).max()) * 0.95
    one.measured.copy_(torch.tensor([anchor, 1.0]))
    expected = by_hand(batch, "skew-reverse", skew_for_gap(-gaps(batch), anchor))
    assert float(one(batch, 0.9).detach()) == pytest.approx(expected, rel=1e-4)


def test_rows_of_the_other_side_count_nothing():
    one = term(until=0.5)
    loss = one(rows(1.0), 0.0)
    assert loss.item() == 0 and one.measured.tolist() == [0, 0]
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in STUDENT.parameters())


def test_without_a_measured_gap_the_skew_stays():
    batch = rows(0.0)
    assert float(term(until=0.0)(batch, 0.5).detach()) == pytest.approx(
        by_hand(batch, "skew-forward", torch.full((3,), 0.1)), rel=1e-4
    )


# -- the system -----------------------------------------------------------------------------------------------------


def objective(**fields: Any) -> Objective:
    system = get_system("distillm-2").make(teacher="x", data="y", **fields)
    task = SimpleNamespace(vocab_size=11, observed_teacher=lambda: Observed(TEACHER, frozen=True))
    return system.objective(SimpleNamespace(task=task, kept=fields.get("kept")), Observed(STUDENT))


def value(made: Objective, batch: dict[str, Any], step: int) -> float:
    values = made.evaluate(Turn(made.signals()), batch, Progress(step, 100))
    return sum(float(one.weighted.detach()) for one in values)


def test_the_sides_weigh_2_1_b_and_2_b():
    """b: half of all until half of the run is done, then the done share, to 1."""
    plain, ramp = objective(curriculum="none"), objective(curriculum="weight")
    for step, b in ((0, 0.5), (30, 0.5), (50, 0.5), (75, 0.75), (99, 0.99)):
        for own, weight in ((0.0, 2 * (1 - b)), (1.0, 2 * b)):
            batch = rows(own)
            assert value(ramp, batch, step) == pytest.approx(weight * value(plain, batch, step), rel=1e-5)


def test_without_its_curriculum_it_is_one_skew_on_each_side():
    batch = rows(0.0)
    assert value(objective(curriculum="none"), batch, 60) == pytest.approx(
        by_hand(batch, "skew-forward", torch.full((3,), 0.1)), rel=1e-4
    )
    assert value(objective(curriculum="none"), rows(1.0), 60) == pytest.approx(
        by_hand(rows(1.0), "skew-reverse", torch.full((3,), 0.1)), rel=1e-4
    )


def test_the_whole_curriculum_is_both():
    both, skewed = objective(), objective(curriculum="skew")
    for made in (both, skewed):
        for one in made.modules():
            if isinstance(one, CurriculumSkew):
                one.measured.copy_(torch.tensor([0.05, 1.0]))
    for own, weight in ((0.0, 0.4), (1.0, 1.6)):
        assert value(both, rows(own), 80) == pytest.approx(weight * value(skewed, rows(own), 80), rel=1e-5)


def test_a_teacher_of_whom_only_some_is_known_cannot_adapt_the_skew():
    system = get_system("distillm-2").make(teacher="x", data="y")
    kept = SimpleNamespace(task=SimpleNamespace(vocab_size=11), kept=Observed(TEACHER, frozen=True), whole=False)
    with pytest.raises(ConfigError, match=r"curriculum=both .* or set curriculum=weight"):
        system.objective(kept, Observed(STUDENT))
    with pytest.raises(ConfigError, match=r"curriculum=skew .* skew-forward"):
        objective(curriculum="skew", divergence="jsd")
