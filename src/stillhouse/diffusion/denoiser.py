"""A denoiser: a network, the process it was trained on and what it predicts, as one module that gives clean samples.

Methods are written against ``denoiser(sample, timestep, class_labels) -> x_0`` and never ask what the network predicts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stillhouse.diffusion.conditions import Classes, Conditions, Shared
from stillhouse.diffusion.parameterisations import Parameterisation
from stillhouse.diffusion.processes import Process
from stillhouse.diffusion.spaces import Pixels, Space


class Home(Shared):
    """The pipeline a network came from: what is saved together with it.

    Args:
        pipeline: of ``diffusers``.
        place: the network's name in it.
    """

    def __init__(self, pipeline: Any, place: str) -> None:
        self.pipeline = pipeline
        self.place = place


class Denoiser(nn.Module):
    """D(x_t, t, c): the network's estimate of E[x_0 | x_t].

    Args:
        net: a ``diffusers`` model called as ``net(sample, timestep, class_labels=...)`` (`UNet2DModel`,
            `DiTTransformer2DModel`, `PointDenoiser`), or with other conditions (`UNet2DConditionModel`). A second half
            of its channels (a learned variance) is ignored.
        process: where alpha and sigma come from.
        parameterisation: what the network predicts.
        conditions: what ``class_labels`` stand for; by default the rows of the network's class embedding.
        space: where samples live; by default they are images.
        home: the pipeline to save it in; by default one is made.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        parameterisation: Parameterisation,
        *,
        conditions: Conditions | None = None,
        space: Space | None = None,
        home: Home | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.process = process
        self.parameterisation = parameterisation
        self.conditions: Conditions = conditions or Classes(getattr(self.config, "num_class_embeds", None) or 0)
        self.space: Space = space or Pixels()
        self.home = home

    def surroundings(self) -> dict[str, Any]:
        """What copies of it share, as keyword arguments: conditions, space, home."""
        return {"conditions": self.conditions, "space": self.space, "home": self.home}

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
        """How many conditions the network knows; 0 if it takes none."""
        return self.conditions.count

    @property
    def features(self) -> str:
        """Path of the module in the middle, whose features say what the network sees: a map, or tokens."""
        if getattr(self.net, "mid_block", None) is not None:
            return "net.mid_block"
        return f"net.transformer_blocks.{len(self.net.transformer_blocks) // 2 - 1}"  # type: ignore[arg-type]

    def output(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's raw output for x_t: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        c_in = self.parameterisation.c_in(*self.process.levels(timestep, sample))
        conditions = self.conditions.arguments(class_labels, sample)
        time_B = self.process.network_time(timestep)
        found = self.net(c_in * sample, timestep=time_B, return_dict=False, **conditions)[0]
        return found[:, : sample.shape[1]]

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x_0 for x_t: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        alpha, sigma = self.process.levels(timestep, sample)
        return self.parameterisation.x_0(self.output(sample, timestep, class_labels), sample, alpha, sigma)
