"""Terms for models that predict a number. Shapes: B batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal


class SquaredError(Term):
    """Mean squared error of a model's one output (B, 1) against ``batch[target]`` (B,), or a teacher's output."""

    def __init__(
        self, student: Signal, teacher: Signal | None = None, *, target: str = "labels", name: str | None = None
    ) -> None:
        signals = {"student": student} | ({} if teacher is None else {"teacher": teacher.detach()})
        super().__init__(name=name, **signals)
        self.target = target

    def compute(self, *, student: Tensor, batch: Batch, teacher: Tensor | None = None, **_: Any) -> Tensor:
        wanted = batch[self.target] if teacher is None else teacher.flatten()
        return (student.flatten().float() - wanted.float()).square().mean()
