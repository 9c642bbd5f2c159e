"""Samplers: from noise to samples, for every process and parameterisation.

A sampler takes ``denoise(x_t, t_B) -> x_0`` (a `Denoiser`, a guided one, a closed form) and times that fall; after the
last one the sample is clean (alpha 1, sigma 0). In x / alpha the probability-flow ODE reads d(x / alpha) / d(sigma /
alpha) = eps for every process (Karras et al., 2022, arXiv 2206.00364, eq. 4), so Euler's method is one formula for all:
DDIM's.

Shapes: B samples x_BX, S times t_S; noise_BSX holds one noise a sample and step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.parameterisations import eps_of
from stillhouse.diffusion.processes import Process

Denoise = Callable[[Tensor, Tensor], Tensor]
Level = tuple[Tensor, Tensor]


def ddim(
    denoise: Denoise,
    x_BX: Tensor,
    t_S: Tensor,
    process: Process,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDIM (Song et al., 2021, arXiv 2010.02502, eq. 12 and 16).

    ``eta`` 0 is deterministic (an Euler step of the ODE); with ``eta`` 1 the noise is that of DDPM. ``generator`` draws
    it.
    """
    for t_B, here, there in _steps(t_S, x_BX, process):
        x_0_BX = denoise(x_BX, t_B)
        (alpha, sigma), (alpha_s, sigma_s) = here, there
        kept = alpha * sigma_s / (alpha_s * sigma)  # share of the noise that would be left if none were added
        fresh = eta * sigma_s * (1 - kept**2).clamp(min=0).sqrt()
        x_BX = alpha_s * x_0_BX + (sigma_s**2 - fresh**2).clamp(min=0).sqrt() * eps_of(x_0_BX, x_BX, alpha, sigma)
        if eta:
            x_BX = x_BX + fresh * torch.randn(x_BX.shape, generator=generator, dtype=x_BX.dtype).to(x_BX.device)
    return x_BX


def euler(denoise: Denoise, x_BX: Tensor, t_S: Tensor, process: Process) -> Tensor:
    """Euler's method on the probability-flow ODE."""
    return ddim(denoise, x_BX, t_S, process)


def ancestral(
    denoise: Denoise, x_BX: Tensor, t_S: Tensor, process: Process, *, generator: torch.Generator | None = None
) -> Tensor:
    """Ancestral sampling (Ho et al., 2020): as much fresh noise in every step as the process itself adds there."""
    return ddim(denoise, x_BX, t_S, process, eta=1.0, generator=generator)


def heun(denoise: Denoise, x_BX: Tensor, t_S: Tensor, process: Process) -> Tensor:
    """Heun's second-order method (Karras et al., 2022, algorithm 1): two evaluations a step.

    Steps from alpha 0 (a flow's first) and to sigma 0 (the last) are Euler steps.
    """
    for (t_B, here, there), next_B in itertools.zip_longest(_steps(t_S, x_BX, process), _times(t_S[1:], x_BX)):
        (alpha, sigma), (alpha_s, sigma_s) = here, there
        x_0_BX = denoise(x_BX, t_B)
        eps_BX = eps_of(x_0_BX, x_BX, alpha, sigma)
        euler_BX = alpha_s * x_0_BX + sigma_s * eps_BX
        if next_B is not None and bool((alpha > 0).all()):
            later_BX = eps_of(denoise(euler_BX, next_B), euler_BX, alpha_s, sigma_s)
            x_BX = alpha_s / alpha * x_BX + (sigma_s - sigma * alpha_s / alpha) * (eps_BX + later_BX) / 2
        else:
            x_BX = euler_BX
    return x_BX


def _times(t_S: Tensor, x_BX: Tensor) -> Iterator[Tensor]:
    yield from t_S.to(x_BX.device)[:, None].expand(-1, len(x_BX))


def _steps(t_S: Tensor, x_BX: Tensor, process: Process) -> Iterator[tuple[Tensor, Level, Level]]:
    """Every step's time, and the levels of noise (alpha, sigma) it leads from and to."""
    times = list(_times(t_S, x_BX))
    levels = [process.levels(t_B, x_BX) for t_B in times]
    clean = (torch.ones_like(levels[0][0]), torch.zeros_like(levels[0][1]))
    yield from zip(times, levels, [*levels[1:], clean], strict=True)


class FewStepGenerator(nn.Module):
    """A generator of few steps: predict x_0, add fresh noise of the next level, predict again.

    It runs through the steps before the one asked for without gradient, on its own outputs, as it will when it is used
    (backward simulation: Yin et al., 2024, arXiv 2405.14867, section 4.5).

    Args:
        denoiser: called at every step; its weights are the generator's.
        times: (S,), falling. At the first the input is pure noise.
    """

    def __init__(self, denoiser: Denoiser, times: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.times: list[int | float] = times.tolist()

    def forward(
        self, noise: Tensor, step: int, class_labels: Tensor | None = None, noised_data: Tensor | None = None
    ) -> Tensor:
        """The clean estimate of step ``step`` (0 the first), with gradient through that step alone.

        Args:
            noise: (B, S, C, H, W), standard normal, one a step.
            noised_data: data (B, C, H, W) that is noised to make the step's input, in place of simulation.
        """
        process = self.denoiser.process
        first = 0 if noised_data is None else step
        x_BX = process.prior_std * noise[:, 0]
        if noised_data is not None and step > 0:
            x_BX = process.add_noise(noised_data, noise[:, step], self._time(step, noise))
        for k in range(first, step):
            with torch.no_grad():
                clean_BX = self.denoiser(x_BX, self._time(k, noise), class_labels)
            x_BX = process.add_noise(clean_BX, noise[:, k + 1], self._time(k + 1, noise))
        return self.denoiser(x_BX, self._time(step, noise), class_labels)

    @torch.no_grad()
    def sample(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Samples from noise (B, S, C, H, W), through all steps."""
        return self(noise, len(self.times) - 1, class_labels)

    def _time(self, step: int, noise: Tensor) -> Tensor:
        return torch.full((len(noise),), self.times[step], device=noise.device)


class OdeSampler(nn.Module):
    """A denoiser's deterministic samples as a module: a map from noise to data that a student can regress on.

    Args:
        denoise: a `Denoiser`, or a guided one.
        times: (S,), falling.
    """

    def __init__(self, denoise: nn.Module, process: Process, times: Tensor) -> None:
        super().__init__()
        self.denoise = denoise
        self.process = process
        self.times = times

    def forward(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Noise (B, S, C, H, W), of which the first is used -> samples (B, C, H, W)."""
        start_BX = self.process.prior_std * noise[:, 0]
        return ddim(lambda x, t: self.denoise(x, t, class_labels), start_BX, self.times, self.process)
