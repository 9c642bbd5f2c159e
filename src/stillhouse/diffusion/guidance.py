"""Guidance: a teacher pushed towards its condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser


def guided(conditional_BX: Tensor, unconditional_BX: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, u + w (c - u) (Ho and Salimans, 2022, arXiv 2207.12598): 1 is plain conditioning."""
    return unconditional_BX + scale * (conditional_BX - unconditional_BX)


class ClassifierFreeGuidance(nn.Module):
    """A class-conditional denoiser under guidance; called as the denoiser itself.

    Guidance of x_0 is guidance of eps, v or the score: all are affine in x_0 with the same coefficients on both sides.

    Args:
        scale: w; at 1 the unconditional forward is left out.
        null_class: the label that stands for no class.
    """

    def __init__(self, denoiser: Denoiser, *, scale: float, null_class: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scale = scale
        self.null_class = null_class

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if self.scale == 1.0 or class_labels is None:
            return self.denoiser(sample, timestep, class_labels)
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.null_class)])
        both = self.denoiser(torch.cat([sample, sample]), torch.cat([timestep, timestep]), labels)
        conditional_BX, unconditional_BX = both.chunk(2)
        return guided(conditional_BX, unconditional_BX, self.scale)
