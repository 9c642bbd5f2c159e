"""Scaling laws of language models: loss by parameters N and tokens D, the best split of compute, the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from stillhouse.base.errors import DataError

CONSTANTS = 5


class Split(NamedTuple):
    """How to spend compute: ``n`` parameters on ``d`` tokens."""

    n: float
    d: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = c_n N^-alpha + c_d D^-beta + floor (Hoffmann et al., 2022, arXiv 2203.15556, eq. 2).

    ``residual``: root mean square in nats; ``intervals``: 95 % by constant, from resampled residuals.
    """

    c_n: float
    alpha: float
    c_d: float
    beta: float
    floor: float
    residual: float = 0.0
    intervals: dict[str, tuple[float, float]] | None = None

    def loss(self, n: float, d: float) -> float:
        return self.c_n * n**-self.alpha + self.c_d * d**-self.beta + self.floor

    def optimum(self, compute: float) -> Split:
        """The split of C = 6 N D with the lowest loss (Hu et al., 2024, arXiv 2404.06395)."""
        both = self.alpha + self.beta
        g = (self.alpha * self.c_n / (self.beta * self.c_d)) ** (1 / both)
        return Split(g * (compute / 6) ** (self.beta / both), (compute / 6) ** (self.alpha / both) / g)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit_scaling_law(
    n: Sequence[float], d: Sequence[float], loss: Sequence[float], *, resamples: int = 100, seed: int = 0
) -> ScalingLaw:
    """Least squares in the logarithm of the loss, from several beginnings; all constants are positive.

    Raises:
        DataError: fewer points than constants, or fewer than two sizes or amounts of data.
    """
    known = [np.asarray(values, dtype=float) for values in (n, d, loss)]
    if len(known[2]) < CONSTANTS or len(set(n)) < 2 or len(set(d)) < 2:
        raise DataError(
            f"a scaling law has {CONSTANTS} constants; {len(known[2])} losses of {len(set(n))} sizes on {len(set(d))} "
            "amounts of data do not fix them; measure more"
        )
    best = _fit(known[0], known[1], known[2])
    fitted = np.array([best.loss(a, b) for a, b in zip(n, d, strict=True)])
    residual = np.log(known[2]) - np.log(fitted)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        again = fitted * np.exp(rng.choice(residual, len(residual)))
        drawn.append(_fit(known[0], known[1], again, begin=best))
    names = ("c_n", "alpha", "c_d", "beta", "floor")
    intervals = None
    if drawn:
        ends = {name: np.quantile([getattr(law, name) for law in drawn], (0.025, 0.975)).tolist() for name in names}
        intervals = {name: (low, high) for name, (low, high) in ends.items()}
    rms = float(np.sqrt(np.mean((fitted - known[2]) ** 2)))
    return ScalingLaw(best.c_n, best.alpha, best.c_d, best.beta, best.floor, rms, intervals)


def _fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, begin: ScalingLaw | None = None) -> ScalingLaw:
    # Constants of N and D are taken at the middle of the data, where they do not trade places with the exponents.
    mid_n, mid_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())

    def made(x: np.ndarray) -> np.ndarray:
        a, alpha, b, beta, floor = np.exp(x)
        return a * (n / mid_n) ** -alpha + b * (d / mid_d) ** -beta + floor

    if begin is None:
        lowest, spread = loss.min(), max(float(loss.max() - loss.min()), 1e-3)
        starts = [
            np.log([spread, alpha, spread, beta, lowest * share])
            for alpha in (0.1, 0.3, 0.7)
            for beta in (0.1, 0.3, 0.7)
            for share in (0.3, 0.9)
        ]
    else:
        a, b = begin.c_n * mid_n**-begin.alpha, begin.c_d * mid_d**-begin.beta
        starts = [np.log([a, begin.alpha, b, begin.beta, begin.floor])]
    # Exponents between 1e-3 and 10, all else between 1e-8 and 1e4 (at the middle of the data): no power overflows.
    low, high = np.log([1e-8, 1e-3, 1e-8, 1e-3, 1e-8]), np.log([1e4, 10, 1e4, 10, 1e4])
    found = [
        least_squares(
            lambda x: np.log(made(x)) - np.log(loss),
            np.clip(start, low + 1e-6, high - 1e-6),
            bounds=(low, high),
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
            max_nfev=400,
        )
        for start in starts
    ]
    a, alpha, b, beta, floor = np.exp(min(found, key=lambda result: result.cost).x)
    return ScalingLaw(float(a * mid_n**alpha), float(alpha), float(b * mid_d**beta), float(beta), float(floor))


def batch_size_law(loss: float) -> float:
    """The best batch, in tokens, of a model that has this loss on C4: 1.21e9 / L^6.24 (Hu et al., 2024)."""
    return 1.21e9 / loss**6.24
