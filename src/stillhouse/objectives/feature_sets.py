"""Terms on several features at once, and on disturbed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Signal


class FeatureSetMSE(Term):
    """Mean squared error over all elements of several pairs of features, as if each side were one long tensor.

    Raises ``ValueError`` if the sides do not pair up, or a pair's shapes differ.
    """

    def __init__(self, students: Sequence[Signal], teachers: Sequence[Signal], *, name: str | None = None) -> None:
        if len(students) != len(teachers) or not students:
            raise ValueError(f"{len(students)} student features and {len(teachers)} teacher features do not pair up")
        sides = {f"student_{i}": signal for i, signal in enumerate(students)}
        sides |= {f"teacher_{i}": signal.detach() for i, signal in enumerate(teachers)}
        super().__init__(name=name, **sides)
        self.pairs = len(students)

    def compute(self, **inputs: Any) -> Tensor:
        total, count = torch.zeros(()), 0
        for i in range(self.pairs):
            student, teacher = inputs[f"student_{i}"], inputs[f"teacher_{i}"]
            if student.shape != teacher.shape:
                raise ValueError(f"{self.name}: pair {i}: {tuple(student.shape)} and {tuple(teacher.shape)} differ")
            total = total.to(student.device) + (student - teacher).float().square().sum()
            count += student.numel()
        return total / count


class DisturbedMSE(Term):
    """Mean squared error to the teacher's features plus Gaussian noise of deviation ``std``, drawn anew each time.

    Where the student still equals the teacher, the plain error and its gradient are zero; the noise gives a gradient
    all the same, by which weights can be scored (SlimSAM, Chen et al., 2023, arXiv 2312.05284).
    """

    def __init__(self, student: Signal, teacher: Signal, *, std: float, name: str | None = None) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())
        self.std = std

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        return (student - (teacher + self.std * torch.randn_like(teacher))).float().square().mean()
