"""Adversarial losses, from logits: large for what the discriminator takes for real.

Shapes: B samples; N logits a sample may be any shape (patches).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def non_saturating_generator(fake_B: Tensor) -> Tensor:
    """softplus(-D(fake)) = -log sigmoid(D) (Goodfellow et al., 2014, arXiv 1406.2661)."""
    return F.softplus(-fake_B).mean()


def non_saturating_discriminator(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake))."""
    return F.softplus(-real_B).mean() + F.softplus(fake_B).mean()


def hinge_generator(fake_B: Tensor) -> Tensor:
    """-D(fake) (Lim and Ye, 2017, arXiv 1705.02894)."""
    return -fake_B.mean()


def hinge_discriminator(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake))."""
    return F.relu(1 - real_B).mean() + F.relu(1 + fake_B).mean()


def r1_penalty(real_B: Tensor, inputs_BX: Tensor) -> Tensor:
    """Squared norm of the gradient of D at real data, mean over samples (Mescheder et al., 2018, arXiv 1801.04406).

    ``inputs_BX`` must require gradients and ``real_B`` be computed from it; the paper multiplies with gamma / 2.
    """
    (gradient_BX,) = torch.autograd.grad(real_B.sum(), inputs_BX, create_graph=True)
    return gradient_BX.square().flatten(1).sum(1).mean()
