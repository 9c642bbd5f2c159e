"""Objectives as measurements: their mean value on batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from stillhouse.core.objective import Objective, total
from stillhouse.core.observed import Turn, as_batch, with_feeds
from stillhouse.core.schedule import Progress


@torch.no_grad()
def mean_values(objectives: Mapping[str, Objective], batches: Iterable[Any]) -> dict[str, float]:
    """The mean of each objective over ``batches`` of one size, with all models in evaluation mode.

    All are computed in one pass: a model that several of them read runs once per view and batch.
    """
    signals = [signal for objective in objectives.values() for signal in objective.signals()]
    models = {id(s.observed): s.observed.module for s in with_feeds(signals)}.values()
    modes = {part: part.training for model in models for part in model.modules()}
    sums = dict.fromkeys(objectives, 0.0)
    count = 0
    try:
        for model in models:
            model.eval()
        turn = Turn(signals)
        for batch in map(as_batch, batches):
            for name, objective in objectives.items():
                sums[name] += float(total(objective.evaluate(turn, batch, Progress(0, 1))))
            turn.clear()
            count += 1
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not count:
        raise ValueError("no batch to measure on")
    return {name: value / count for name, value in sums.items()}
