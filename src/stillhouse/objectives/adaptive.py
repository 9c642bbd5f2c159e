"""Adaptive schedules: numbers steered by the loss they steer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.base.errors import ConfigError
from stillhouse.core.schedule import AdaptiveSchedule, Progress


class MomentumRamp(AdaptiveSchedule):
    """TAID's interpolation coefficient t (Shing et al., 2025, arXiv 2501.16937, Algorithm 1).

    Grows from ``start`` to ``end``, never below the straight line between them, and faster while the loss J falls:

        delta = (J_prev - J) / (J_prev + eps),   m <- beta m + (1 - beta) delta,
        t <- min(end, max(t_lin, t + alpha sigmoid(m) (1 - t))).

    With ``alpha`` = 0 it is the straight line.
    """

    t: Tensor
    momentum: Tensor
    previous: Tensor

    def __init__(
        self, start: float = 0.4, end: float = 1.0, *, alpha: float = 5e-4, beta: float = 0.99, eps: float = 1e-15
    ) -> None:
        super().__init__()
        if not 0 <= start <= end <= 1:
            raise ConfigError(f"need 0 <= start <= end <= 1, got start={start}, end={end}")
        self.start, self.end, self.alpha, self.beta, self.eps = start, end, alpha, beta, eps
        self.register_buffer("t", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("momentum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("previous", torch.tensor(math.nan, dtype=torch.float64))

    def value(self, progress: Progress) -> float:
        return float(self.t)

    def observe(self, loss: float, progress: Progress) -> None:
        previous = float(self.previous)
        self.previous.fill_(loss)
        if math.isnan(previous):
            return
        delta = (previous - loss) / (previous + self.eps)
        self.momentum.mul_(self.beta).add_((1 - self.beta) * delta)
        step = self.alpha * torch.sigmoid(self.momentum) * (1 - self.t)
        t_lin = self.start + (self.end - self.start) * progress.fraction
        self.t.copy_(torch.clamp(torch.clamp(self.t + step, min=t_lin), max=self.end))
