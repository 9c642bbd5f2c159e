"""Figures of classifiers against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillhouse.metrics.classification import aurc, compare_classifiers, figures_of


def test_aurc_of_a_perfect_ranking():
    """With error rate r it tends to r + (1 - r) ln(1 - r)."""
    n, r = 20_000, 0.3
    correct = torch.arange(n) < (1 - r) * n
    confidence = torch.linspace(1, 0, n, dtype=torch.float64)
    assert aurc(confidence, correct) == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-4)


def test_aurc_of_no_ranking_is_the_error_rate():
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(50_000, generator=generator) < 0.7
    assert aurc(torch.rand(50_000, generator=generator), correct) == pytest.approx(0.3, abs=0.02)


def test_aurc_by_hand():
    """Ranked right, wrong, right, wrong: risks 0, 1/2, 1/3, 1/2 at the four coverages."""
    correct = torch.tensor([False, True, False, True])
    confidence = torch.tensor([0.2, 0.9, 0.7, 0.5])
    assert aurc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_figures_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    q = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5 - 1e-6]])
    labels = torch.tensor([0, 1, 1])
    found = figures_of(q.log() + 3.0, labels, reference_NV=p.log())
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.nll == pytest.approx(-(math.log(0.6) + math.log(0.3) + math.log(0.5)) / 3, abs=1e-5)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), abs=1e-5)
    assert found.entropy == pytest.approx(float(-(q * q.log()).sum(1).mean()), abs=1e-5)
    assert found.ece == pytest.approx(((1 - 0.6) + 0.7 + 0.5) / 3, abs=1e-5)  # three bins with one prediction each
    alone = figures_of(q.log(), labels)
    assert (alone.agreement, alone.kl) == (1.0, 0.0)


class Fixed(nn.Module):
    """Says that the class is where the pixel is."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, pixel_values: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.factor * pixel_values.flatten(1)})


def test_batches_change_nothing():
    generator = torch.Generator().manual_seed(1)
    pixels, labels = torch.randn(11, 1, 2, 2, generator=generator), torch.randint(4, (11,), generator=generator)
    models = {"one": Fixed(1.0), "other": Fixed(-2.0)}

    def batches(size: int) -> list[dict[str, torch.Tensor]]:
        return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(size), labels.split(size), strict=True)]

    whole = compare_classifiers(models, batches(11), reference="one")
    cut = compare_classifiers(models, batches(3), reference="one")
    for name in models:
        assert whole[name].nll == cut[name].nll and whole[name].aurc == cut[name].aurc
    assert whole["one"].agreement == 1.0 and whole["other"].agreement < 1.0
    assert whole["one"].accuracy == pytest.approx((pixels.flatten(1).argmax(1) == labels).double().mean().item())
