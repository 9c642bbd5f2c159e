"""How much privacy DP-SGD has spent, as accounted for by ``opacus`` (optional: ``stillhouse[privacy]``)."""

from __future__ import annotations

from stillhouse.base.errors import ConfigError


def spent_epsilon(*, multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon of (epsilon, ``delta``)-differential privacy after some steps, an upper bound.

    It is the budget of one sequence of the text. The accountant (Renyi; Mironov et al., 2019, arXiv 1908.10530) takes
    every sequence to be drawn into each batch with probability ``rate``, independently; batches of a shuffled text are
    customarily counted so, too, though the theorem is not about them.

    Args:
        multiplier: deviation of the noise over the largest gradient norm.
        rate: share of the sequences in a batch.
        steps: noisy gradients that were taken.

    Raises:
        ConfigError: ``opacus`` is not installed.
    """
    if not multiplier:
        return float("inf")
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise ConfigError("dp_delta needs opacus, which is not installed: pip install 'stillhouse[privacy]'") from error
    accountant = RDPAccountant()
    accountant.history = [(multiplier, min(1.0, rate), steps)]
    return float(accountant.get_epsilon(delta))
