"""Steps that look for flat minima: where to look before stepping, and in which direction to step.

Weights and gradients come as lists of tensors, one a parameter; norms and products are over all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def inner(a: Tensors, b: Tensors) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def adaptive_perturbation(weights: Tensors, gradients: Tensors, *, rho: float, eps: float = 1e-12) -> list[Tensor]:
    """rho w^2 g / || |w| g ||: the worst step of size rho where a weight counts by its size.

    Adaptive sharpness-aware minimisation (Kwon et al., 2021, arXiv 2102.11600, equation 7).
    """
    scaled = [w.abs() * g for w, g in zip(weights, gradients, strict=True)]
    factor = rho / (inner(scaled, scaled).sqrt() + eps)
    return [w.square() * g * factor for w, g in zip(weights, gradients, strict=True)]


def gsam_direction(gradients: Tensors, perturbed: Tensors, *, alpha: float, eps: float = 1e-12) -> list[Tensor]:
    """g_p - alpha g_v, where g_v is the part of the gradient g that stands upright on the perturbed gradient g_p.

    Surrogate-gap minimisation (Zhuang et al., 2022, arXiv 2203.08065): stepping against g_v as well narrows the gap
    between the perturbed loss and the loss without raising the former. At alpha = 0 this is sharpness-aware
    minimisation.
    """
    share = inner(gradients, perturbed) / (inner(perturbed, perturbed) + eps)
    return [g_p - alpha * (g - share * g_p) for g, g_p in zip(gradients, perturbed, strict=True)]
