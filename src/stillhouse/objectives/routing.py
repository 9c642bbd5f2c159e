"""Terms on the routers of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Signal
from stillhouse.losses.routing import load_balance


class LoadBalance(Term):
    """The mean over routers of `load_balance`; also logs the share of the busiest expert.

    Args:
        routers: the logits of each router, (tokens, experts).
        active: experts that a token is sent to.
    """

    def __init__(self, routers: Sequence[Signal], *, active: int, name: str | None = None) -> None:
        super().__init__(name=name, **{f"router_{number}": signal for number, signal in enumerate(routers)})
        self.active = active

    def compute(self, *, batch: Any, progress: Any, **routers: Tensor) -> Tensor:
        found = [load_balance(logits_NE, active=self.active) for logits_NE in routers.values()]
        self.log("busiest", torch.stack([shares_E.max() for _, shares_E in found]).max())
        return torch.stack([loss for loss, _ in found]).mean()
