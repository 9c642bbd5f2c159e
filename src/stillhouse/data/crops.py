"""Crops drawn anew for every batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.sources import Change


def random_resized_crop(low: float = 0.2, high: float = 1.0, *, aspect: float = 4 / 3) -> Change:
    """Cut a share ``low`` to ``high`` of each image's area, of a shape up to ``aspect``, and bring it to full size."""

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        pixels: Tensor = batch["pixel_values"]
        area, turn, x, y = torch.rand(4, len(pixels), generator=generator)
        share, ratio = low + (high - low) * area, ((2 * turn - 1) * math.log(aspect)).exp()
        width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
        zero = torch.zeros_like(width)
        left, top = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1)  # centres of the crops, from -1 to 1
        maps = torch.stack([torch.stack([width, zero, left], -1), torch.stack([zero, height, top], -1)], 1)
        grid = F.affine_grid(maps.to(pixels), list(pixels.shape), align_corners=False)
        return {**batch, "pixel_values": F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)}

    return change


def random_erasing(share: float, *, low: float = 0.02, high: float = 1 / 3, aspect: float = 10 / 3) -> Change:
    """With probability ``share`` fill a rectangle of each image, ``low`` to ``high`` of its area, with normal noise
    (Zhong et al., 2020, arXiv 1708.04896).
    """

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        pixels: Tensor = batch["pixel_values"]
        count, _, rows, columns = pixels.shape
        chance, area, turn, x, y = torch.rand(5, count, generator=generator)
        wanted, ratio = low + (high - low) * area, ((2 * turn - 1) * math.log(aspect)).exp()
        height = ((wanted / ratio).sqrt().clamp(max=1) * rows).round().clamp(min=1)
        width = ((wanted * ratio).sqrt().clamp(max=1) * columns).round().clamp(min=1)
        top, left = (y * (rows - height + 1)).floor(), (x * (columns - width + 1)).floor()
        inside_y = _between(torch.arange(rows), top, top + height)
        inside_x = _between(torch.arange(columns), left, left + width)
        hole = (inside_y[:, :, None] & inside_x[:, None, :] & (chance < share)[:, None, None])[:, None]
        return {**batch, "pixel_values": torch.where(hole, torch.randn(pixels.shape, generator=generator), pixels)}

    return change


def _between(places: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (places >= low[:, None]) & (places < high[:, None])


def mix_images(classes: int, *, mixup: float = 0.8, cutmix: float = 1.0, smoothing: float = 0.1) -> Change:
    """Mix each image with the one at the other end of the batch, by weight or by rectangle (a coin decides for all),
    and add ``soft_labels`` (B, V) mixed alike.

    ``mixup`` and ``cutmix`` are the parameters of the Beta distributions of the share; 0 turns one off, and both off
    leave the images alone (Zhang et al., 2018, arXiv 1710.09412; Yun et al., 2019, arXiv 1905.04899).
    """

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        pixels: Tensor = batch["pixel_values"]
        coin, uniform, y, x = torch.rand(4, generator=generator).tolist()
        pasted = cutmix > 0 and (mixup <= 0 or coin < 0.5)
        alpha = cutmix if pasted else mixup
        share = _beta(alpha, uniform) if alpha > 0 else 1.0  # of the first image
        if pasted:
            height, width = (round(side * math.sqrt(1 - share)) for side in pixels.shape[2:])
            top, left = (int(place * (side + 1 - cut)) for place, side, cut in _places(pixels, (y, x), (height, width)))
            mixed = pixels.clone()
            area = (..., slice(top, top + height), slice(left, left + width))
            mixed[area] = pixels.flip(0)[area]
            share = 1 - height * width / math.prod(pixels.shape[2:])
        else:
            mixed = share * pixels + (1 - share) * pixels.flip(0)
        onehot = F.one_hot(batch["labels"], classes).float() * (1 - smoothing) + smoothing / classes
        return {**batch, "pixel_values": mixed, "soft_labels": share * onehot + (1 - share) * onehot.flip(0)}

    return change


def _places(pixels: Tensor, at: tuple[float, float], cut: tuple[int, int]) -> list[tuple[float, int, int]]:
    return list(zip(at, pixels.shape[2:], cut, strict=True))


def _beta(alpha: float, uniform: float) -> float:
    """A symmetric Beta variate by its inverse distribution function."""
    from scipy.stats import beta

    return float(beta.ppf(uniform, alpha, alpha))
