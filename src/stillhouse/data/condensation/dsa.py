"""Differentiable siamese augmentation (Zhao and Bilen, 2021, arXiv 2102.08259): one random change for a whole batch.

Real and synthetic images (or the synthetic images of one step) go through the same change, and gradients through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]


def augment(images: Tensor, kinds: Sequence[Kind], generator: torch.Generator) -> Tensor:
    """One of ``kinds``, drawn by the generator, applied to all images (B, C, H, W) alike; no kinds: no change."""
    if not kinds:
        return images
    draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    kind = kinds[min(int(draw[0] * len(kinds)), len(kinds) - 1)]
    first, second, third = (2 * value - 1 for value in draw[1:])  # each in [-1, 1)
    if kind == "color":
        return _color(images, brightness=first / 2, saturation=1 + second, contrast=1 + third / 2)
    if kind == "cutout":
        return _cutout(images, first, second)
    if kind == "crop":
        return _warp(images, torch.tensor([[1.0, 0.0, first / 4], [0.0, 1.0, second / 4]]))
    if kind == "flip":
        return images.flip(-1) if first < 0 else images
    if kind == "scale":
        grown, widened = 1.2**first, 1.2**second
        return _warp(images, torch.tensor([[grown, 0.0, 0.0], [0.0, widened, 0.0]]))
    turn = math.radians(15) * first
    cosine, sine = math.cos(turn), math.sin(turn)
    return _warp(images, torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]))


def _color(images: Tensor, *, brightness: float, saturation: float, contrast: float) -> Tensor:
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * contrast


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """The images moved by an affine map of the coordinates [-1, 1]; zeros come in."""
    theta = matrix.to(images)[None].expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _cutout(images: Tensor, across: float, down: float) -> Tensor:
    """Zeros in a square of half the side, centred anywhere."""
    height, width = images.shape[-2:]
    y, x = (down + 1) / 2 * height, (across + 1) / 2 * width
    rows = (torch.arange(height, device=images.device) - y).abs() < height / 4
    columns = (torch.arange(width, device=images.device) - x).abs() < width / 4
    return images.masked_fill(rows[:, None] & columns, 0.0)
