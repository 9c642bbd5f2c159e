"""Two lists of scored results become one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scores = Mapping[str, float]
"""``key of a result -> score``."""


def top(scores: np.ndarray, keys: list[str], count: int) -> dict[str, float]:
    """The ``count`` best results with a score above zero, best first; ties keep the order of ``keys``."""
    best = np.argsort(-scores, kind="stable")[:count]
    return {keys[position]: float(scores[position]) for position in best if scores[position] > 0}


FEW = 10  # in shorter lists the largest score stands in for the percentile


def percentile_normalised(scores: Scores, *, percentile: float = 95.0) -> dict[str, float]:
    """Scores over a high percentile of their own list, clipped to 1: one runaway result does not flatten the rest.

    What lies above the percentile becomes equal: of a hundred results, the first five at 95. At 100 nothing does.
    """
    if not scores:
        return {}
    high = float(np.percentile(list(scores.values()), percentile if len(scores) >= FEW else 100.0))
    return {key: min(1.0, score / high) if high > 0 else 0.0 for key, score in scores.items()}


def fused(
    first: Scores,
    second: Scores,
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    boost: float = 1.2,
    percentile: float = 95.0,
) -> dict[str, float]:
    """One list, best first: w1 a + w2 b of the normalised scores, times ``boost`` for what both lists hold."""
    a, b = (percentile_normalised(scores, percentile=percentile) for scores in (first, second))
    mixed = {
        key: (weights[0] * a.get(key, 0.0) + weights[1] * b.get(key, 0.0)) * (boost if key in a and key in b else 1.0)
        for key in dict.fromkeys([*a, *b])
    }
    return dict(sorted(mixed.items(), key=lambda pair: -pair[1]))


def cross_layer(
    first: Scores,
    second: Scores,
    *,
    shares: tuple[float, float] = (0.5, 0.5),
    boost: float = 1.2,
    percentile: float = 95.0,
) -> dict[str, float]:
    """The lists of two layers as one, with weights so scaled that the best possible score, boost included, is 1."""
    scale = 1 / (boost * sum(shares))
    weights = (shares[0] * scale, shares[1] * scale)
    return fused(first, second, weights=weights, boost=boost, percentile=percentile)
