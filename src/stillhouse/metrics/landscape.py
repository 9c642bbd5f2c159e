"""The loss between checkpoints, and the river valley that explains what a decay of the learning rate does.

In the model of a river valley (Wen et al., 2024, arXiv 2410.05192) the loss is h(x) + gamma y^2 / 2: x runs along the
river, y up the hill, and the gradient of y has noise of standard deviation sigma. Suffixes: P particles, S steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def between(one: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights at ``share`` of the way from ``one`` to ``other``; what is not floating point stays ``one``'s."""
    return {
        name: torch.lerp(value, other[name], share) if value.is_floating_point() else value
        for name, value in one.items()
    }


@torch.no_grad()
def losses_between(
    one: nn.Module, other: nn.Module, loss: Callable[[nn.Module], float], *, points: int = 5
) -> list[float]:
    """The loss at ``points`` evenly spaced places on the segment between two models of one shape, ends included.

    Between two stable checkpoints it dips (valley walls on both sides); between two decayed ones it falls (the river).
    The weights of ``one`` are as before when this returns.
    """
    first = {name: value.clone() for name, value in one.state_dict().items()}
    last = other.state_dict()
    found = []
    for place in range(points):
        one.load_state_dict(between(first, last, place / (points - 1)))
        found.append(loss(one))
    one.load_state_dict(first)
    return found


def gradient_cosine(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> float:
    """Mean cosine between the gradients of consecutive losses: how much of a step is signal rather than noise.

    A single loss, of a text that is one batch, is followed by itself: no noise, 1.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss(), weights, materialize_grads=True, allow_unused=True)]
        )
        for loss in losses
    ]
    gradients = gradients * 2 if len(gradients) == 1 else gradients
    cosines = [F.cosine_similarity(a, b, dim=0) for a, b in itertools.pairwise(gradients)]
    return float(torch.stack(cosines).mean())


def hill_loss(rate: float, *, gamma: float = 1.0, sigma: float = 1.0) -> float:
    """The mean loss up the hill at a constant rate: rate sigma^2 / (2 (2 - rate gamma))."""
    return rate * sigma**2 / (2 * (2 - rate * gamma))


def greedy_rate(variance: float, *, gamma: float = 1.0, sigma: float = 1.0) -> tuple[float, float]:
    """(the rate that lowers the variance of y most in one step, the variance after it)."""
    rate = gamma * variance / (gamma**2 * variance + sigma**2)
    return rate, (1 - rate * gamma) ** 2 * variance + rate**2 * sigma**2


class Descent(NamedTuple):
    """Where SGD in the river valley ends: mean loss, and how far along the river."""

    loss: float
    river: float


def descend(
    rates: Sequence[float],
    *,
    gamma: float = 1.0,
    sigma: float = 1.0,
    slope: float = 0.01,
    particles: int = 2000,
    seed: int = 0,
) -> Descent:
    """SGD with the given rates in the valley gamma y^2 / 2 - slope x, from (0, 0); the mean over ``particles``."""
    generator = torch.Generator().manual_seed(seed)
    y_P = torch.zeros(particles, dtype=torch.float64)
    for rate in rates:
        noise_P = torch.randn(particles, generator=generator, dtype=torch.float64)
        y_P = (1 - rate * gamma) * y_P - rate * sigma * noise_P
    river = slope * sum(rates)
    return Descent(float(0.5 * gamma * y_P.square().mean()) - slope * river, river)
