"""Claims of one experiment: they share their arms, their budget and the table that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.core.artifact import Artifact
from stillhouse.core.system import Claim


@dataclass(frozen=True)
class Experiment:
    """Arms of one system that are compared under one budget.

    ``Experiment("bd-kd", {"bd-kd": {}, "dml": {"exchange": "dml"}}, "equal steps").claim(...)``

    Args:
        system: name of the system that all arms run.
        arms: field overrides by the arm's name.
        budget: what is equal in all of them, in words.
        seeds: how many seeds are run.
        stage: the stage whose figures are read.
    """

    system: str
    arms: Mapping[str, Mapping[str, Any]]
    budget: str
    seeds: int = 3
    stage: str = "evaluation"

    def claim(
        self,
        statement: str,
        metric: str,
        figure: str | Callable[[Mapping[str, float]], float],
        method: str,
        baseline: str,
        *,
        higher_is_better: bool = True,
        scope: Literal["central", "consequence"] = "central",
    ) -> Claim:
        """A claim that ``method`` is better than ``baseline``; ``figure``: a figure's name, or what is made of them."""

        def measure(artifacts: Mapping[str, Artifact]) -> float:
            figures = artifacts[self.stage].metrics
            return figures[figure] if isinstance(figure, str) else figure(figures)

        return Claim(
            statement=statement,
            metric=metric,
            method=method,
            baseline=baseline,
            variants={name: (self.system, values) for name, values in self.arms.items()},
            measure=measure,
            higher_is_better=higher_is_better,
            scope=scope,
            seeds=self.seeds,
            budget=self.budget,
        )
