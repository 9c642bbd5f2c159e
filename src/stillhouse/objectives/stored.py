"""Terms on distributions that were written down before: soft labels by sample.

Shapes: B batch, N samples, V classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal


class StoredMatch(Term):
    """T^2 KL(p || softmax(logits / T)) to stored probabilities p, mean over the batch.

    Args:
        soft_NV: the probabilities, softened by the same temperature already.
        index: the entry of the batch that says which rows of ``soft_NV`` its samples are.
    """

    soft: Tensor

    def __init__(
        self, student: Signal, soft_NV: Tensor, *, temperature: float = 1.0, index: str = "index", name: str = "soft"
    ) -> None:
        super().__init__(name=name, student=student)
        self.temperature = temperature
        self.index = index
        self.register_buffer("soft", soft_NV, persistent=False)  # an earlier stage's artifact has them

    def compute(self, *, student: Tensor, batch: Batch, **_: Any) -> Tensor:
        p_BV = self.soft[batch[self.index]]
        log_q_BV = (student.float() / self.temperature).log_softmax(-1)
        return self.temperature**2 * (p_BV.xlogy(p_BV) - p_BV * log_q_BV).sum(-1).mean()
