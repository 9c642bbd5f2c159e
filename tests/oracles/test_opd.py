"""The survey of on-policy distillation: the walk on which mistakes can be made good, and mode behaviour."""

from __future__ import annotations

import pytest
import torch

from stillhouse.losses.divergences import ForwardKL, ReverseKL, TotalVariation
from stillhouse.tasks.corrective_walk import (
    BOS,
    PROMPT,
    SEP,
    STEPS,
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
    from types import SimpleNamespace

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
