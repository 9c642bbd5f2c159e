"""Divergences whose hyper-parameters follow schedules."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.core.objective import Term
from stillhouse.core.schedule import AdaptiveSchedule, Progress, Schedule, Scheduled, resolve
from stillhouse.losses.divergences import RowDivergence


class ScheduledDivergence(nn.Module):
    """A row divergence with some of its fields given as schedules; `now` gives the divergence of the moment."""

    def __init__(self, divergence: RowDivergence, **scheduled: Scheduled) -> None:
        super().__init__()
        known = [f.name for f in dataclasses.fields(cast(Any, divergence))] if scheduled else []
        for name in scheduled:
            if name not in known:
                raise ConfigError(f"{type(divergence).__name__} has no field {name!r}{suggest(name, known)}")
        fixed = {name: value for name, value in scheduled.items() if isinstance(value, int | float)}
        self._base = dataclasses.replace(cast(Any, divergence), **fixed) if fixed else divergence
        self._moving: dict[str, Schedule | AdaptiveSchedule] = {}
        for name, value in scheduled.items():
            if not isinstance(value, int | float):
                self._moving[name] = value
        self.adaptive = nn.ModuleList(v for v in self._moving.values() if isinstance(v, AdaptiveSchedule))

    def now(self, term: Term, progress: Progress) -> RowDivergence:
        """The divergence at this point of the run; what moves is logged with ``term``."""
        if not self._moving:
            return self._base
        values = {name: resolve(value, progress) for name, value in self._moving.items()}
        for name, value in values.items():
            term.log(name, value)
        return dataclasses.replace(cast(Any, self._base), **values)

    def record(self, loss: Tensor, progress: Progress) -> None:
        """Report the loss to the schedules that watch it."""
        for schedule in self.adaptive:
            cast(AdaptiveSchedule, schedule).record(loss, progress)
