"""What a denoising network predicts, and how that becomes a clean sample.

Every noise process here is x_t = alpha x_0 + sigma eps with eps ~ N(0, I). A network F predicts one of eps, x_0, v, a
flow velocity, or EDM's preconditioned residual; `Parameterisation.x_0` turns its output into the clean sample it
stands for, `Parameterisation.target` gives what it should have predicted.

Shapes: B samples of any shape, written x_BX (images: X = CHW). ``alpha`` and ``sigma`` broadcast against x_BX: see
`per_sample`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def per_sample(value_B: Tensor, x_BX: Tensor) -> Tensor:
    """One number a sample, in a shape that broadcasts against ``x_BX``: (B,) -> (B, 1, ..., 1)."""
    return value_B.reshape(-1, *[1] * (x_BX.ndim - 1)).to(x_BX.dtype)


class Parameterisation(Protocol):
    """What a network predicts. All members are functions of the level of noise (alpha, sigma)."""

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The factor on x_t before it enters the network."""
        ...

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample that the network's output stands for."""
        ...

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should put out for x_t = alpha x_0 + sigma eps."""
        ...

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """w with ||F - target||^2 = w ||x_0(F) - x_0||^2: the plain squared error of the output, seen from x_0."""
        ...


@dataclass(frozen=True)
class _Plain:
    """A network that reads x_t as it is."""

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class Epsilon(_Plain):
    """F predicts the noise (Ho et al., 2020, arXiv 2006.11239)."""

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t_BX - sigma * output_BX) / alpha

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps_BX

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / sigma) ** 2


@dataclass(frozen=True)
class Sample(_Plain):
    """F predicts the clean sample itself."""

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output_BX

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_0_BX

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class V(_Plain):
    """F predicts v = alpha eps - sigma x_0 (Salimans and Ho, 2022, arXiv 2202.00512)."""

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * x_t_BX - sigma * output_BX) / (alpha**2 + sigma**2)

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps_BX - sigma * x_0_BX

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ((alpha**2 + sigma**2) / sigma) ** 2


@dataclass(frozen=True)
class FlowVelocity(_Plain):
    """F predicts u = eps - x_0, the velocity of rectified flow (Liu et al., 2022, arXiv 2209.03003).

    As in ``diffusers`` and SD3, time runs from data (0) to noise (1).
    """

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t_BX - sigma * output_BX) / (alpha + sigma)

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps_BX - x_0_BX

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ((alpha + sigma) / sigma) ** 2


@dataclass(frozen=True)
class EDM:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al., 2022, arXiv 2206.00364, table 1); alpha = 1."""

    sigma_data: float = 0.5

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def x_0(self, output_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.c_skip(sigma) * x_t_BX + self.c_out(sigma) * output_BX

    def target(self, x_0_BX: Tensor, eps_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_0_BX - self.c_skip(sigma) * (x_0_BX + sigma * eps_BX)) / self.c_out(sigma)

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """lambda(sigma) = 1 / c_out^2 = sigma^-2 + sigma_data^-2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


def c_noise(sigma_B: Tensor) -> Tensor:
    """EDM's conditioning on the level of noise, ln(sigma) / 4."""
    return sigma_B.log() / 4


# -- between predictions ----------------------------------------------------------------------------------------------


def eps_of(x_0_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that together with ``x_0`` makes ``x_t``."""
    return (x_t_BX - alpha * x_0_BX) / sigma


def score_of(x_0_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of log p_t at x_t, from E[x_0 | x_t] (Tweedie's formula): (alpha x_0 - x_t) / sigma^2."""
    return (alpha * x_0_BX - x_t_BX) / sigma**2


def x_0_of_score(score_BX: Tensor, x_t_BX: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_t] from the score: the inverse of `score_of`."""
    return (x_t_BX + sigma**2 * score_BX) / alpha


# -- weights and times of the denoising loss --------------------------------------------------------------------------


def min_snr_weight(alpha: Tensor, sigma: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma), for a squared error of x_0 (Hang et al., 2023, arXiv 2303.09556)."""
    return (alpha / sigma).square().clamp(max=gamma)


def log_normal_sigmas(count: int, generator: torch.Generator, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Training noise levels of EDM: ln(sigma) ~ N(mean, std^2); (count,)."""
    return (mean + std * torch.randn(count, generator=generator)).exp()


def logit_normal_times(count: int, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training times of rectified flow in SD3: logit(t) ~ N(mean, std^2) (Esser et al., 2024, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """Move times in [0, 1] towards noise: shift t / (1 + (shift - 1) t) (Esser et al., 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t) if not math.isclose(shift, 1.0) else t
