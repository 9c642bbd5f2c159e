"""A denoiser: a network, the process it was trained on and what it predicts, as one module that gives clean samples.

Methods are written against ``denoiser(sample, timestep, class_labels) -> x_0`` and never ask what the network predicts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stillhouse.diffusion.parameterisations import Parameterisation
from stillhouse.diffusion.processes import Process


class Denoiser(nn.Module):
    """D(x_t, t, c): the network's estimate of E[x_0 | x_t].

    Args:
        net: a ``diffusers`` model called as ``net(sample, timestep, class_labels=...)`` (`UNet2DModel`,
            `DiTTransformer2DModel`, `PointDenoiser`). A second half of its channels (a learned variance) is ignored.
        process: where alpha and sigma come from.
        parameterisation: what the network predicts.
    """

    def __init__(self, net: nn.Module, process: Process, parameterisation: Parameterisation) -> None:
        super().__init__()
        self.net = net
        self.process = process
        self.parameterisation = parameterisation

    @property
    def config(self) -> Any:
        """The network's own configuration."""
        return self.net.config

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    @property
    def classes(self) -> int:
        """Rows of the class embedding; 0 if the network takes no class."""
        return getattr(self.config, "num_class_embeds", None) or 0

    def output(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's raw output for x_t: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        c_in = self.parameterisation.c_in(*self.process.levels(timestep, sample))
        labels = {"class_labels": class_labels} if self.classes else {}
        found = self.net(c_in * sample, self.process.network_time(timestep), return_dict=False, **labels)[0]
        return found[:, : sample.shape[1]]

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x_0 for x_t: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        alpha, sigma = self.process.levels(timestep, sample)
        return self.parameterisation.x_0(self.output(sample, timestep, class_labels), sample, alpha, sigma)
