"""Glyphs: small grey images of characters, drawn from the fonts that come with matplotlib.

Characters are the classes; fonts, rotation, shear, size and place vary. Image i of a split depends on the split and on
i only.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.images import Images

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
LARGE = 48  # pixels of the drawing that small images are taken from


def glyphs(
    split: str = "train", *, characters: str = "0123456789", size: int = 16, count: int = 4096, channels: int = 1
) -> Images:
    """``count`` images (channels, size, size) in [0, 1], white on black; the labels are positions in ``characters``.

    Args:
        split: ``train``, ``selection`` or ``test``: other images of the same kind.
    """
    seed = {"train": 0, "selection": 1, "test": 2}[split]
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(len(characters), (count,), generator=generator)
    fonts_N = torch.randint(len(FONTS), (count,), generator=generator)
    masters_KFHW = _masters(characters)
    theta_N23 = _affine(torch.rand(count, 5, generator=generator) * 2 - 1)
    drawn = masters_KFHW[labels_N, fonts_N][:, None]
    # Sampled at four points a pixel and averaged: the drawing is finer than the image.
    points = F.affine_grid(theta_N23, [count, 1, 2 * size, 2 * size], align_corners=False)
    pixels = F.avg_pool2d(F.grid_sample(drawn, points, align_corners=False), 2)
    pixels = pixels.clamp(0, 1).expand(-1, channels, -1, -1)
    return Images(pixels, labels_N, tuple(characters), f"glyphs/{split}")


def _affine(u_N5: Tensor) -> Tensor:
    """Maps of the plane from five numbers in [-1, 1] each: rotation, shear, size, place."""
    rotation, shear, size, right, down = u_N5.unbind(1)
    angle, scale = rotation * math.radians(10), 1 + 0.12 * size
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shear = 0.15 * shear
    rows = [cos, cos * shear - sin, 0.1 * right, sin, sin * shear + cos, 0.1 * down]
    return torch.stack(rows, 1).reshape(-1, 2, 3)


@functools.cache
def _masters(characters: str) -> Tensor:
    """Every character in every font, large and in the middle: (characters, fonts, LARGE, LARGE)."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = []
    for character in characters:
        for name in FONTS:
            font = ImageFont.truetype(str(folder / f"{name}.ttf"), 44)
            image = Image.new("L", (LARGE, LARGE))
            ImageDraw.Draw(image).text((LARGE / 2, LARGE / 2), character, fill=255, font=font, anchor="mm")
            images.append(torch.from_numpy(np.asarray(image, dtype=np.float32) / 255))
    return torch.stack(images).reshape(len(characters), len(FONTS), LARGE, LARGE)
