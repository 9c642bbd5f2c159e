"""Densities in the plane: where a generative method can be seen, and measured against the truth.

Each has an exact sampler; mixtures of Gaussians also have the exact score at every level of noise. Their coordinates
have about unit variance.

Shapes: B points x_B2, K components or classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.base.errors import DataError, suggest

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Density:
    """A density in the plane whose points belong to classes.

    Attributes:
        draw: ``draw(count, generator)`` gives points (count, 2) and classes (count,).
        modes: centres (K, 2) of modes that a generator should not lose; None where there are none.
        std: standard deviation of a point around its mode, if the density is an even mixture of such Gaussians.
    """

    name: str
    draw: Draw
    classes: int
    modes: Tensor | None = None
    std: float | None = None

    def exact_x_0(self, x_t_B2: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x_0 | x_t] for x_t = alpha x_0 + sigma eps; raises `DataError` where there is no closed form.

        The posterior over components is soft-max of -|x_t - alpha m_k|^2 / 2 v with v = alpha^2 std^2 + sigma^2; within
        one, x_0 is Gaussian around m_k + alpha std^2 / v (x_t - alpha m_k).
        """
        modes_K2, std = self._mixture()
        v = alpha**2 * std**2 + sigma**2
        away_BK2 = x_t_B2[:, None, :] - torch.as_tensor(alpha)[..., None] * modes_K2.to(x_t_B2)
        weight_BK = (-away_BK2.square().sum(-1) / (2 * v)).softmax(-1)
        shrink = torch.as_tensor(alpha * std**2 / v)
        inside_BK2 = modes_K2.to(x_t_B2) + shrink[..., None] * away_BK2
        return (weight_BK[..., None] * inside_BK2).sum(1)

    def log_prob(self, x_B2: Tensor) -> Tensor:
        """Log-density of points, (B,); raises `DataError` where there is no closed form."""
        modes_K2, std = self._mixture()
        square_BK = (x_B2[:, None, :] - modes_K2.to(x_B2)).square().sum(-1)
        return (-square_BK / (2 * std**2)).logsumexp(-1) - math.log(2 * math.pi * std**2 * len(modes_K2))

    def _mixture(self) -> tuple[Tensor, float]:
        if self.modes is None or self.std is None:
            raise DataError(f"density {self.name!r} has no closed form; use a mixture, such as eight-gaussians")
        return self.modes, self.std


def mixture(name: str, modes_K2: Tensor, std: float) -> Density:
    """An even mixture of round Gaussians; the classes are its components."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        which_B = torch.randint(len(modes_K2), (count,), generator=generator)
        return modes_K2[which_B] + std * torch.randn(count, 2, generator=generator), which_B

    return Density(name, draw, len(modes_K2), modes_K2, std)


def ring(*, radius: float = 1.4, std: float = 0.12, count: int = 8, name: str = "eight-gaussians") -> Density:
    """Gaussians on a circle."""
    angle_K = 2 * math.pi * torch.arange(count) / count
    return mixture(name, radius * torch.stack([angle_K.cos(), angle_K.sin()], 1), std)


def grid(*, side: int = 5, std: float = 0.08) -> Density:
    """Gaussians on a square grid of coordinates with unit variance."""
    line = torch.linspace(-1.4, 1.4, side)
    return mixture("grid", torch.cartesian_prod(line, line), std)


def _moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    which_B = torch.randint(2, (count,), generator=generator)
    angle_B = math.pi * torch.rand(count, generator=generator)
    sign_B = 1.0 - 2.0 * which_B
    x_B2 = torch.stack([sign_B * angle_B.cos() + which_B, sign_B * angle_B.sin() + 0.5 * which_B], 1)
    centred_B2 = (x_B2 - torch.tensor([0.5, 0.25])) * torch.tensor([1.15, 2.0])
    return centred_B2 + 0.08 * torch.randn(count, 2, generator=generator), which_B


def _spirals(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    which_B = torch.randint(2, (count,), generator=generator)
    along_B = torch.rand(count, generator=generator).sqrt()
    angle_B = 3 * math.pi * along_B + math.pi * which_B
    x_B2 = 2.0 * along_B[:, None] * torch.stack([angle_B.cos(), angle_B.sin()], 1)
    return x_B2 + 0.05 * torch.randn(count, 2, generator=generator), which_B


def _checkerboard(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    row_B = torch.randint(4, (count,), generator=generator)
    column_B = 2 * torch.randint(2, (count,), generator=generator) + row_B % 2
    cell_B2 = torch.stack([column_B, row_B], 1) + torch.rand(count, 2, generator=generator)
    return (cell_B2 - 2) * 0.85, row_B * 2 + column_B // 2


MAKERS: dict[str, Callable[[], Density]] = {
    "eight-gaussians": ring,
    "broad-eight-gaussians": lambda: ring(std=0.3, name="broad-eight-gaussians"),
    "grid": grid,
    "moons": lambda: Density("moons", _moons, 2),
    "spirals": lambda: Density("spirals", _spirals, 2),
    "checkerboard": lambda: Density("checkerboard", _checkerboard, 8),
}
"""The embedded densities by name."""


def density(name: str) -> Density:
    """The embedded density called ``name``."""
    if name not in MAKERS:
        raise DataError(f"there is no density {name!r}{suggest(name, MAKERS)}")
    return MAKERS[name]()
