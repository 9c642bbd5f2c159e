"""How stable a reinforcement run is: how far its reward falls at first, when it is back, how short responses get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HORIZON = 50  # rounds that count as the beginning of a run


def reward_dip(reward: Sequence[float], *, horizon: int = HORIZON) -> float:
    """R(0) - min R over the first ``horizon`` rounds; 0 if it never falls below where it began."""
    return reward[0] - min(reward[: horizon + 1])


def recovery_time(reward: Sequence[float], *, horizon: int = HORIZON) -> int | None:
    """First round at which the reward is back at R(0) after the dip's minimum; 0 without a dip, None if never."""
    early = reward[: horizon + 1]
    lowest = early.index(min(early))
    return next((t for t in range(lowest, len(reward)) if reward[t] >= reward[0]), None)


def collapse_ratio(length: Sequence[float], *, horizon: int = HORIZON) -> float:
    """min length over the first ``horizon`` rounds / length at the beginning; small: responses collapse."""
    return min(length[: horizon + 1]) / length[0]


@dataclass(frozen=True)
class Stability:
    """The three figures of a run (BAI's phenomena, Zheng et al., 2025, arXiv 2509.00309)."""

    dip: float
    recovery: int | None
    collapse: float

    @staticmethod
    def of(reward: Sequence[float], length: Sequence[float], *, horizon: int = HORIZON) -> Stability:
        return Stability(
            reward_dip(reward, horizon=horizon),
            recovery_time(reward, horizon=horizon),
            collapse_ratio(length, horizon=horizon),
        )


def by_round(values: Sequence[float], rounds: Sequence[float]) -> list[float]:
    """Means of what was logged in the optimizer steps of each round of rollouts; ``rounds`` says in which."""
    found: dict[float, list[float]] = {}
    for value, number in zip(values, rounds, strict=True):
        found.setdefault(number, []).append(value)
    return [sum(part) / len(part) for part in found.values()]
