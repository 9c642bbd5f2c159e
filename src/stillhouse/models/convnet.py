"""Small classifiers without running statistics, which can be unrolled: the ConvNet of data set distillation, an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class ConvNet(nn.Module):
    """``depth`` blocks of 3x3 convolution, instance normalisation, ReLU and 2x2 mean pooling, then a linear layer.

    The network of Gidaris and Komodakis (2018) as data set distillation uses it: "ConvNet-D3" is depth 3, width 128.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        channels, height, side = shape
        blocks: list[nn.Module] = []
        for _ in range(depth):
            blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU()]
            if min(height, side) > 1:
                blocks.append(nn.AvgPool2d(2))
                height, side = height // 2, side // 2
            channels = width
        self.features = nn.Sequential(*blocks)
        self.classify = nn.Linear(width * height * side, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        return self.classify(self.features(pixel_values).flatten(1))


class MLP(nn.Module):
    """A perceptron on the pixels."""

    def __init__(self, shape: tuple[int, int, int], classes: int, *, widths: Sequence[int] = (64,)) -> None:
        super().__init__()
        sizes = [prod(shape), *widths]
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], classes))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, classes)."""
        return self.layers(pixel_values.flatten(1))
