"""Generated images of coloured shapes, with everything a vision task may ask about them.

Each image shows a few disks, squares, triangles and crosses on a shaded, noisy ground, some of them striped, some in
front of others. What is known of every shape: its visible mask, box, a point inside, extreme points, kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": lambda u, v: u.square() + v.square() <= 1,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) <= 0.85,
    "triangle": lambda u, v: (v >= -0.5) & (v <= 1 - math.sqrt(3) * u.abs()),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) <= 0.33) & (torch.maximum(u.abs(), v.abs()) <= 1),
}
"""Kind -> whether the point (u, v) lies inside, with the shape centred, upright and about one unit in radius."""

KEYPOINTS = ("top", "right", "bottom", "left")
"""What the keypoints of a shape are: the outermost pixels of its visible mask (the middle one where several are)."""


class Shapes:
    """``count`` images of ``objects`` shapes each; item i depends on ``seed`` and i only.

    An item is a dict of tensors; K objects, S pixels a side, coordinates (x, y) in pixels, x to the right, y down:

    - ``image`` (3, S, S), from 0 to 1
    - ``masks`` (K, S, S) bool, what is visible of each object; they do not overlap
    - ``boxes`` (K, 4), left, top, right, bottom: the outermost pixels, inclusive
    - ``points`` (K, 2), the pixel that lies deepest inside the mask
    - ``keypoints`` (K, 4, 2), see `KEYPOINTS`
    - ``kinds`` (K,), index into `KINDS`
    """

    def __init__(self, count: int, *, size: int = 32, objects: int = 2, seed: int = 0) -> None:
        self.size = size
        self.objects = objects
        self.seed = seed
        self._drawn: list[dict[str, Tensor] | None] = [None] * count

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self._drawn[index]
        if item is None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + range(len(self))[index])
            item = self._drawn[index] = self._draw(generator)
        return item

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        while True:  # until nothing is hidden: a few attempts at most
            image, masks, kinds = self._paint(generator)
            if masks.sum((1, 2)).min() >= 0.015 * self.size**2:
                return {"image": image, "masks": masks, "kinds": kinds, **described(masks)}

    def _paint(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        size, count = self.size, self.objects

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator)

        y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
        shade = uniform(-0.3, 0.3, 2)
        image = uniform(0.25, 0.75, 3)[:, None, None] + (shade[0] * (x - 0.5) + shade[1] * (y - 0.5))
        kinds = torch.randint(len(KINDS), (count,), generator=generator)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        for k, kind in enumerate(kinds.tolist()):
            centre, radius, turn = uniform(0.15, 0.85, 2), uniform(0.15, 0.3, 1), uniform(0, 2 * math.pi, 1)
            du, dv = (x - centre[0]) / radius, (y - centre[1]) / radius
            u, v = du * turn.cos() + dv * turn.sin(), dv * turn.cos() - du * turn.sin()
            inside = list(KINDS.values())[kind](u, v)
            colour, other = uniform(0, 1, 3)[:, None, None], uniform(0, 1, 3)[:, None, None]
            striped = uniform(0, 1, 1) < 0.4
            fill = torch.where(striped & ((3 * u).floor() % 2 == 0), 0.6 * colour + 0.4 * other, colour)
            image = torch.where(inside, fill, image)
            masks[:k] &= ~inside
            masks[k] = inside
        noise = 0.03 * torch.randn(image.shape, generator=generator)
        return (image + noise).clamp(0, 1), masks, kinds


def described(masks_KHW: Tensor) -> dict[str, Tensor]:
    """Boxes (K, 4), inner points (K, 2) and keypoints (K, 4, 2) of masks (K, H, W) none of which is empty."""
    boxes, points, keypoints = [], [], []
    for mask_HW in masks_KHW:
        ys, xs = (place.tolist() for place in mask_HW.nonzero(as_tuple=True))
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        depth_HW = distance_transform_edt(torch.nn.functional.pad(mask_HW, (1, 1, 1, 1)).numpy())[1:-1, 1:-1]
        deepest = int(depth_HW.argmax())

        def middle(along: list[int], across: list[int], at: int) -> float:
            on = sorted(a for a, b in zip(along, across, strict=True) if b == at)
            return float(on[len(on) // 2])

        boxes.append([left, top, right, bottom])
        points.append([deepest % mask_HW.shape[1], deepest // mask_HW.shape[1]])
        keypoints.append(
            [
                [middle(xs, ys, top), top],
                [right, middle(ys, xs, right)],
                [middle(xs, ys, bottom), bottom],
                [left, middle(ys, xs, left)],
            ]
        )
    made: dict[str, Any] = {"boxes": boxes, "points": points, "keypoints": keypoints}
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in made.items()}
