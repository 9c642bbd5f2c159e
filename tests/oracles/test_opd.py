"""The survey of on-policy distillation: the walk on which mistakes can be made good, and mode behaviour."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stillhouse.losses.divergences import ForwardKL, ReverseKL, TotalVariation
from stillhouse.metrics.compounding import expected_errors
from stillhouse.tasks.corrective_walk import (
    BOS,
    PROMPT,
    SEP,
    STEPS,
    excess_error,
    expert,
    exposure,
    rule_log_p,
    rule_teacher,
    walks,
)


def test_the_expert_goes_to_the_target_and_stays():
    place, target = torch.tensor([2]), torch.tensor([5])
    path = []
    for _ in range(5):
        place = expert(place, target)
        path.append(int(place))
    assert path == [3, 4, 5, 5, 5]
    walk = walks(200, torch.Generator().manual_seed(0))
    assert walk.shape == (200, PROMPT + STEPS) and (walk[:, 0] == BOS).all() and (walk[:, [2, 4]] == SEP).all()
    assert ((walk[:, PROMPT] - walk[:, 1]).abs() <= 1).all() and ((walk[:, -1] - walk[:, 3]).abs() <= 4).all()


def test_the_teacher_knows_the_way_from_wherever_one_stands():
    """Also from a position that no walk of the expert passes."""
    off = torch.tensor([[BOS, 2, SEP, 5, SEP, 3, 9]])
    p = rule_log_p(off).exp()
    assert p.sum(-1) == pytest.approx(torch.ones(1, 7).numpy(), abs=1e-5)
    assert p[0, 4].argmax() == 3 and p[0, 5].argmax() == 4 and p[0, 6].argmax() == 8
    assert p[0, 6, 8] == pytest.approx(0.98)
    logits = rule_teacher()(input_ids=off).logits
    torch.testing.assert_close(logits.log_softmax(-1), p.log())


def test_who_follows_the_rule_is_right_wherever_it_is_pushed():
    found = exposure(rule_teacher(), seed=0)
    assert found == {"right_0": 1.0, "right_0.1": 1.0, "right_0.2": 1.0}


def test_who_knows_the_path_by_heart_is_right_only_on_it():
    """It says where the expert would be at that time, wherever it stands itself."""

    class ByHeart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
            place, target = input_ids[:, 1], input_ids[:, 3]
            for _ in range(input_ids.shape[1] - PROMPT + 1):
                place = expert(place, target)
            return SimpleNamespace(logits=torch.nn.functional.one_hot(place, 16).float()[:, None])

    found = exposure(ByHeart(), seed=0)
    assert found["right_0"] == 1.0 and found["right_0.2"] < 0.95


class Lost(torch.nn.Module):
    """On the expert's path it takes the expert's move with probability 1 - e; once off it, never again."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = torch.nn.Parameter(torch.tensor(error))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        on = torch.ones(len(input_ids), dtype=torch.bool)
        for place in range(PROMPT, input_ids.shape[1]):
            on &= input_ids[:, place] == rule_log_p(input_ids[:, :place])[:, -1].argmax(-1)
        move = rule_log_p(input_ids)[:, -1].argmax(-1, keepdim=True)
        right = torch.where(on, 1 - self.error, 1e-9)[:, None]
        p = ((1 - right) / 15).expand(-1, 16).scatter(1, move, right)
        return SimpleNamespace(logits=p.log()[:, None])


def test_excess_error_of_one_that_never_finds_back():
    """Exactly: own walks 1 - (1 - e)^t, the teacher's 1 - (1 - e) 0.98^(t - 1), as the first error is the last step."""
    error, count = 0.1, 4096
    found = excess_error(Lost(error), seed=0, count=count)
    given = [1 - (1 - error) * 0.98 ** (step - 1) for step in range(1, STEPS + 1)]
    for step in range(1, STEPS + 1):
        expected = 1 - (1 - error) ** step - given[step - 1]
        assert found[f"excess_{step}"] == pytest.approx(expected, abs=5 * 0.7 * count**-0.5)
    assert found["excess_1"] == 0.0 and found["excess_8"] > 0.3
    assert found["lost_unrecovered"] == pytest.approx(expected_errors(sum(given) / STEPS, 100), rel=0.02)
    assert found["lost_recovered"] == pytest.approx(100 * sum(given) / STEPS, rel=0.05)


def test_the_teacher_has_no_excess_error_and_nothing_else_is_drawn():
    teacher = rule_teacher()
    before = torch.get_rng_state()
    found = excess_error(teacher, seed=3)
    assert [found[f"excess_{step}"] for step in range(1, STEPS + 1)] == pytest.approx([0.0] * STEPS, abs=1e-6)
    assert found["lost_recovered"] == pytest.approx(2.0, abs=1e-5)
    assert torch.equal(before, torch.get_rng_state())
    assert set(exposure(teacher, seed=0)) == {"right_0", "right_0.1", "right_0.2"}


# -- what errors come to --------------------------------------------------------------------------------------------


def test_the_card_s_regret():
    assert 100 - expected_errors(0.01, 100) == pytest.approx(62.76, abs=5e-3)
    assert 100 - expected_errors(0.01, 100) == pytest.approx(sum(0.99**t for t in range(1, 101)))
    assert expected_errors(0.01, 100, recovery=1.0) == pytest.approx(1.0)
    growth = [expected_errors(1e-5, 2 * T) / expected_errors(1e-5, T) for T in (100, 200)]
    assert growth == pytest.approx([4.0, 4.0], rel=0.01)  # T^2 without recovery
    assert expected_errors(1e-5, 200, recovery=1.0) == pytest.approx(2 * expected_errors(1e-5, 100, recovery=1.0))


@pytest.mark.parametrize("recovery", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("error", [0.0, 0.02, 0.5, 1.0])
def test_errors_against_recursion_and_simulation(error, recovery):
    wrong, total = 0.0, 0.0
    for _ in range(40):
        wrong = (1 - wrong) * error + wrong * ((1 - recovery) + recovery * error)
        total += wrong
    assert expected_errors(error, 40, recovery=recovery) == pytest.approx(total, abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    off, count = torch.zeros(20_000, dtype=torch.bool), 0.0
    for _ in range(40):
        back, errs = (torch.rand(20_000, generator=generator) < p for p in (recovery, error))
        off = (off & ~back) | errs
        count += float(off.float().mean())
    assert count == pytest.approx(total, abs=0.5)


def test_errors_are_probabilities():
    for bad in ({"error": -0.1, "steps": 3}, {"error": 0.1, "steps": -1}, {"error": 0.1, "steps": 1, "recovery": 2.0}):
        with pytest.raises(ValueError, match="must"):
            expected_errors(**bad)


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "covers"), [(ForwardKL(), True), (ReverseKL(), False)])
def test_forward_kl_covers_both_modes_and_reverse_kl_takes_one(divergence, covers):
    """A bell of two parameters is fitted to two bells on 21 places."""
    x = torch.arange(21.0)
    teacher = torch.logaddexp(-((x - 4) ** 2) / 4, -((x - 16) ** 2) / 4)[None]
    centre, width = torch.tensor(14.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.Adam([centre, width], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        divergence((-((x - centre) ** 2) / (2 * width.exp() ** 2))[None], teacher).sum().backward()
        optimizer.step()
    q = (-((x - centre) ** 2) / (2 * width.exp() ** 2)).softmax(-1)
    left = float(q[:10].sum().detach())
    assert 0.4 < left < 0.6 if covers else max(left, 1 - left) > 0.9


def test_speculative_decoding_accepts_what_total_variation_leaves():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.4, 0.3])
    variation = TotalVariation()(q.log()[None], p.log()[None]).item()
    assert variation == pytest.approx(0.4) and torch.minimum(p, q).sum().item() == pytest.approx(1 - variation)
