"""How steep and how curved the loss of a model is: what changes while its learning rate decays.

(Hu et al., 2024, arXiv 2404.06395, on the dynamics of the decay stage.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Slope(NamedTuple):
    """The norm of a loss's gradient g, and its curvature along it, g' H g / g' g."""

    norm: float
    curvature: float


def _gradient(weights: list[nn.Parameter], loss: Callable[[], Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss(), weights, materialize_grads=True, allow_unused=True)
    return [gradient.detach() for gradient in found]


def slope(model: nn.Module, loss: Callable[[], Tensor], *, step: float = 1e-2) -> Slope:
    """Gradient and curvature of ``loss`` at the weights that a model has; they are the same when this returns.

    The curvature is a central difference of gradients ``step`` to both sides along the gradient: exact for a quadratic
    loss, and it needs no second derivative, which fused attention does not have.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = _gradient(weights, loss)
    norm = float(torch.stack([one.double().square().sum() for one in gradient]).sum().sqrt())
    if norm == 0:
        return Slope(0.0, 0.0)
    before = [weight.detach().clone() for weight in weights]
    ends = []
    for side in (step, -step):
        with torch.no_grad():
            for weight, old, along in zip(weights, before, gradient, strict=True):
                weight.copy_(old + side / norm * along)
        there = _gradient(weights, loss)
        ends.append(sum(float((a.double() * b.double()).sum()) for a, b in zip(there, gradient, strict=True)) / norm)
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    return Slope(norm, (ends[0] - ends[1]) / (2 * step))


def movement(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Root mean square by which the weights of two models of one shape differ."""
    pairs = [(value, other[name]) for name, value in one.items() if value.is_floating_point()]
    square = sum(float((a.double().cpu() - b.double().cpu()).square().sum()) for a, b in pairs)
    return float((square / sum(value.numel() for value, _ in pairs)) ** 0.5)
