"""Exponential moving averages of models: teachers that follow their student, and smoothed results."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stillhouse.core.schedule import Progress, Scheduled, resolve


class EMA:
    """A copy of ``model`` whose weights follow it: ``average <- decay * average + (1 - decay) * weights``.

    The copy is ``ema.module``: observe it as a teacher (``Observed(ema.module, frozen=True)``) or save it as the
    result. Buffers are copied. ``decay`` may follow a schedule.
    """

    def __init__(self, model: nn.Module, decay: Scheduled = 0.999) -> None:
        self.model = model
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, progress: Progress) -> None:
        """Take one step towards the model's current weights."""
        decay = resolve(self.decay, progress)
        live = dict(self.model.named_parameters())
        pairs = [(mean, live[name]) for name, mean in self.module.named_parameters()]
        torch._foreach_lerp_(
            [mean for mean, _ in pairs], [now.detach().to(mean.dtype) for mean, now in pairs], 1 - decay
        )
        for mean, now in zip(self.module.buffers(), self.model.buffers(), strict=True):
            mean.copy_(now)
