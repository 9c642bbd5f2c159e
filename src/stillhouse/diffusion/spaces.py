"""Where a denoiser's samples live: among images themselves, or in the latent space of a frozen autoencoder.

Shapes: B images (C, H, W) in [-1, 1]; B samples (c, h, w).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.diffusion.conditions import Shared

SHOWN = 64  # samples of which a picture is made where that costs a network's pass
CHUNK = 16


class Space(Protocol):
    """How images become samples, and back."""

    def to(self, device: torch.device) -> None:
        """Do what follows on another device."""
        ...

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images whose samples have ``shape``."""
        ...

    def encode(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples of images; where one image has many, ``generator`` draws, and without it the likeliest is taken."""
        ...

    def shown(self, samples_BX: Tensor) -> Tensor:
        """Images of the first samples, for a picture."""
        ...


class Pixels:
    """Samples are images."""

    def to(self, device: torch.device) -> None:
        pass

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape

    def encode(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images_BCHW

    def shown(self, samples_BX: Tensor) -> Tensor:
        return samples_BX


class Latents(Shared):
    """Samples are scaled latents of an ``AutoencoderKL`` (Rombach et al., 2022, arXiv 2112.10752).

    Args:
        vae: frozen; what comes out of it is on the CPU.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.float().eval().requires_grad_(False)
        self.scale, self.shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0

    def to(self, device: torch.device) -> None:
        self.vae.to(device)

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        larger = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.in_channels, larger * shape[1], larger * shape[2]

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        latents = []
        for part in images_BCHW.split(CHUNK):
            code = self.vae.encode(part.to(self.vae.device)).latent_dist
            latents.append((code.mode() if generator is None else code.sample(generator)).cpu())
        return self.scale * (torch.cat(latents) - self.shift)

    @torch.no_grad()
    def shown(self, samples_BX: Tensor) -> Tensor:
        return torch.cat([self.decode(part) for part in samples_BX[:SHOWN].split(CHUNK)])

    def decode(self, samples_BX: Tensor) -> Tensor:
        """Images of samples."""
        return self.vae.decode((samples_BX / self.scale + self.shift).to(self.vae.device)).sample.cpu()
