"""A learning rate that falls when a figure of the evaluations stops getting better."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.core.schedule import AdaptiveSchedule, Progress


class ReduceOnPlateau(AdaptiveSchedule):
    """Multiplies by ``factor`` after more than ``patience`` evaluations without a new best (higher is better).

    As ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with its default relative threshold. Give it to a `Player` as
    ``lr``, and call `watch` with the figure in the stage's ``evaluate``; its state is saved with the run.
    """

    state: Tensor

    def __init__(self, *, factor: float, patience: int, threshold: float = 1e-4) -> None:
        super().__init__()
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self.register_buffer("state", torch.tensor([-torch.inf, 0.0, 1.0], dtype=torch.float64))  # best, waited, value

    def value(self, progress: Progress) -> float:
        return float(self.state[2])

    def watch(self, figure: float) -> None:
        """Take in the figure of one evaluation."""
        best, waited, value = self.state.tolist()
        if figure > best + abs(best) * self.threshold or best == -torch.inf:
            best, waited = figure, 0.0
        else:
            waited += 1
        if waited > self.patience:
            value, waited = value * self.factor, 0.0
        self.state.copy_(torch.tensor([best, waited, value], dtype=torch.float64))
