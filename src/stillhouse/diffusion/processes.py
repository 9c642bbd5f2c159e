"""Noise processes: how a clean sample becomes noise, x_t = alpha_t x_0 + sigma_t eps.

Three families share one interface: `DiscreteVP` (DDPM and all that came of it: t a step number), `Karras` (EDM: t is
sigma, alpha 1) and `RectifiedFlow` (t in [0, 1], alpha 1 - t, sigma t). Times of each are also named by a fraction of
the schedule, 0 clean and 1 noise, through `Process.at`, so that methods can be written for all of them.

Shapes: B samples of any shape, x_BX (images: X = CHW); S sampling times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.diffusion.parameterisations import c_noise, per_sample, shifted


class Process(nn.Module):
    """Base of noise processes; ``t_B`` holds one time a sample. It has no weights: a `Denoiser` holds it as a part."""

    prior_std: float = 1.0  # of x_t at the noisiest time, where nothing of the data is left

    def alpha(self, t_B: Tensor) -> Tensor:
        """The factor on the data, (B,)."""
        raise NotImplementedError

    def sigma(self, t_B: Tensor) -> Tensor:
        """The standard deviation of the noise, (B,)."""
        raise NotImplementedError

    def at(self, fraction_B: Tensor) -> Tensor:
        """The time at a fraction of the schedule: 0 the cleanest, 1 the noisiest."""
        raise NotImplementedError

    def network_time(self, t_B: Tensor) -> Tensor:
        """What the network is told of the time."""
        return t_B

    def few_step_times(self, steps: int) -> Tensor:
        """Times (S,) of a generator of so many steps, the noisiest first, at equal shares of the schedule."""
        return self.at(1 - torch.arange(steps) / steps)

    def levels(self, t_B: Tensor, x_BX: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t_B``, in shapes that broadcast against ``x_BX``."""
        return per_sample(self.alpha(t_B), x_BX), per_sample(self.sigma(t_B), x_BX)

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio, (B,)."""
        return (self.alpha(t_B) / self.sigma(t_B)) ** 2

    def add_noise(self, x_0_BX: Tensor, eps_BX: Tensor, t_B: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.levels(t_B, x_0_BX)
        return alpha * x_0_BX + sigma * eps_BX

    def sample_t(self, count: int, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Times drawn evenly from the part of the schedule between two fractions, (count,)."""
        return self.at(low + (high - low) * torch.rand(count, generator=generator))


class DiscreteVP(Process):
    """DDPM's process (Ho et al., 2020): t in 0..T-1, alpha_t^2 = prod (1 - beta), sigma_t^2 = 1 - alpha_t^2.

    Args:
        alphas_cumprod: alpha_t^2 for every t, (T,), falling.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.alphas_cumprod = (
            alphas_cumprod.double().cpu()
        )  # no buffer: a change of the model's dtype must not touch it
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def linear(steps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> DiscreteVP:
        """Betas on a straight line: DDPM's."""
        return DiscreteVP(torch.cumprod(1 - torch.linspace(start, end, steps, dtype=torch.float64), 0))

    @staticmethod
    def scaled_linear(steps: int = 1000, *, start: float = 0.00085, end: float = 0.012) -> DiscreteVP:
        """Square roots of betas on a straight line: Stable Diffusion's."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        return DiscreteVP(torch.cumprod(1 - betas, 0))

    @staticmethod
    def cosine(steps: int = 1000, *, offset: float = 0.008) -> DiscreteVP:
        """A quarter cosine (Nichol and Dhariwal, 2021, arXiv 2102.09672), betas at most 0.999."""
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return DiscreteVP(torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), 0))

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha_t^2 / alpha_{t-1}^2, (T,)."""
        before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            both = (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
            self._tables[device] = (both[0].float().to(device), both[1].float().to(device))
        return self._tables[device]

    def alpha(self, t_B: Tensor) -> Tensor:
        return self._table(t_B.device)[0][t_B]

    def sigma(self, t_B: Tensor) -> Tensor:
        return self._table(t_B.device)[1][t_B]

    def at(self, fraction_B: Tensor) -> Tensor:
        return ((fraction_B.double() * self.steps).ceil().long() - 1).clamp(0, self.steps - 1)

    def few_step_times(self, steps: int) -> Tensor:
        """T = 1000 and 4 steps: 999, 749, 499, 249."""
        return self.steps // steps * torch.arange(steps, 0, -1) - 1


class Karras(Process):
    """EDM's process (Karras et al., 2022, arXiv 2206.00364): t is sigma itself, alpha 1.

    Fractions of the schedule follow eq. 5: sigma^(1/rho) runs evenly from sigma_min^(1/rho) to sigma_max^(1/rho).

    Args:
        noise_scale: factor on c_noise = ln(sigma) / 4, the time the network is told (1000 in consistency models).
    """

    def __init__(
        self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, noise_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.noise_scale = noise_scale
        self.prior_std = sigma_max

    def alpha(self, t_B: Tensor) -> Tensor:
        return torch.ones_like(t_B)

    def sigma(self, t_B: Tensor) -> Tensor:
        return t_B

    def at(self, fraction_B: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + fraction_B * (high - low)) ** self.rho

    def network_time(self, t_B: Tensor) -> Tensor:
        return self.noise_scale * c_noise(t_B)


class RectifiedFlow(Process):
    """Straight lines from data to noise (Liu et al., 2022, arXiv 2209.03003): x_t = (1 - t) x_0 + t eps, t in (0, 1].

    Args:
        shift: moves the schedule towards noise, as SD3 does for large images.
        noise_scale: factor on t for the network (1000 in ``diffusers``).
        t_min: the cleanest time.
    """

    def __init__(self, *, shift: float = 1.0, noise_scale: float = 1000.0, t_min: float = 1e-3) -> None:
        super().__init__()
        self.shift, self.noise_scale, self.t_min = shift, noise_scale, t_min

    def alpha(self, t_B: Tensor) -> Tensor:
        return 1 - t_B

    def sigma(self, t_B: Tensor) -> Tensor:
        return t_B

    def at(self, fraction_B: Tensor) -> Tensor:
        return torch.as_tensor(shifted(fraction_B, self.shift)).clamp(self.t_min, 1.0)

    def network_time(self, t_B: Tensor) -> Tensor:
        return self.noise_scale * t_B
