"""Discriminators: heads on the features of another network."""

from __future__ import annotations

import math

from torch import Tensor, nn


class FeatureDiscriminator(nn.Module):
    """A logit from a map of features (DMD2: Yin et al., 2024, arXiv 2405.14867, appendix).

    4 x 4 convolutions of stride 2 with GroupNorm and SiLU halve the map until 4 x 4 or less is left; one convolution
    then covers it, and another gives the logit. A map of one pixel gets the two last layers alone.

    Args:
        channels: C of the features.
        size: H = W of the features.
    """

    def __init__(self, channels: int, size: int = 1) -> None:
        super().__init__()
        groups = math.gcd(32, channels)
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B,)."""
        return self.layers(inputs).flatten(1).mean(1)
