"""Denoisers that are not in ``diffusers``: a small network for points."""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PointDenoiser(ModelMixin, ConfigMixin):
    """A residual MLP for points in a few dimensions, called, saved and loaded like ``UNet2DModel``.

    A point in C dimensions is an image of one pixel with C channels: (B, C, 1, 1).

    Args:
        in_channels: C.
        width: of the hidden layers.
        depth: residual blocks.
        time_scale: the network sees ``timestep * time_scale`` through sines of ``bands`` octaves, coordinates through
            half as many beside the coordinates themselves.
        num_class_embeds: rows of the class embedding; None takes no class.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        width: int = 96,
        depth: int = 3,
        time_scale: float = 1e-3,
        bands: int = 6,
        num_class_embeds: int | None = None,
        sample_size: int = 1,
        out_channels: int = 2,
    ) -> None:
        super().__init__()
        octaves = math.pi * 2.0 ** torch.arange(-1, bands - 1)
        self.register_buffer("time_frequencies", time_scale * octaves, persistent=False)
        self.register_buffer("frequencies", octaves[: bands // 2], persistent=False)
        self.conv_in = nn.Linear(in_channels * (1 + 2 * (bands // 2)), width)
        self.time_embedding = nn.Sequential(nn.Linear(2 * bands, width), nn.SiLU())
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.mid_block = nn.Identity()  # what a discriminator listens to, as in a U-Net
        self.conv_out = nn.Sequential(nn.SiLU(), nn.Linear(width, out_channels))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """(B, C, 1, 1), a time or one a sample -> (B, C, 1, 1), in a tuple."""
        time_B = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).to(sample.dtype)
        condition_BH = self.time_embedding(_waves(time_B[:, None] * self.time_frequencies.to(sample.dtype)))
        if self.class_embedding is not None:
            condition_BH = condition_BH + self.class_embedding(class_labels)
        x_BC = sample.flatten(1)
        waves_BF = _waves((x_BC[:, :, None] * self.frequencies.to(sample.dtype)).flatten(1))
        hidden_BH = self.conv_in(torch.cat([x_BC, waves_BF], 1))
        for block in self.blocks:
            hidden_BH = block(hidden_BH, condition_BH)
        output_BC = self.conv_out(self.mid_block(hidden_BH[:, :, None, None]).flatten(1))
        return (output_BC[:, :, None, None],)


def _waves(angle_BF: Tensor) -> Tensor:
    return torch.cat([angle_BF.sin(), angle_BF.cos()], 1)


class _Block(nn.Module):
    """h + W2 SiLU(W1 SiLU(h + c))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden_BH: Tensor, condition_BH: Tensor) -> Tensor:
        inner_BH = self.first(nn.functional.silu(hidden_BH + condition_BH))
        return hidden_BH + self.second(nn.functional.silu(inner_BH))
