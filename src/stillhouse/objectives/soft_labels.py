"""Cross-entropy against labels that are distributions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal


class SoftCrossEntropy(Term):
    """Cross-entropy of ``student`` logits (B, V) against ``batch[target]`` (B, V): mixed or smoothed labels."""

    def __init__(self, student: Signal, *, target: str = "soft_labels", name: str | None = None) -> None:
        super().__init__(name=name, student=student)
        self.target = target

    def compute(self, *, student: Tensor, batch: Batch, **_: Any) -> Tensor:
        return F.cross_entropy(student.float(), batch[self.target])
