"""How often a model that samples its answers is right."""

from __future__ import annotations

from math import comb


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Chance that at least one of ``k`` answers is right, estimated without bias from ``correct`` of ``samples``.

    1 - C(n - c, k) / C(n, k) (Chen et al., 2021, arXiv 2107.03374). Raises ``ValueError`` unless 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, of which there are {samples}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def collapsed(
    chosen: tuple[float, float], rejected: tuple[float, float], accuracy: tuple[float, float], *, fall: float = 0.5
) -> bool:
    """Whether a preference objective took the good responses down with the bad ones.

    Each argument is a (before, after) pair: mean log-probability per token of the better and of the worse responses,
    and accuracy. True if both log-probabilities fell by more than ``fall`` nats and accuracy fell too.
    """
    return chosen[0] - chosen[1] > fall and rejected[0] - rejected[1] > fall and accuracy[1] < accuracy[0]
