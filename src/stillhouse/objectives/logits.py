"""Terms on logits: labels and teachers, for any model that returns logits.

Shapes: B batch, ... any further places (tokens, pixels), V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.losses.divergences import ForwardKL, LabelledDivergence, RowDivergence, align_vocabulary, reduce
from stillhouse.losses.linear_divergence import IGNORE_INDEX
from stillhouse.objectives.scheduled import ScheduledDivergence


class CrossEntropy(Term):
    """Cross-entropy of ``student`` logits (B, ..., V) against ``batch[target]`` (B, ...); -100 is left out.

    Where nothing is left, it is 0 with zero gradients.
    """

    def __init__(
        self, student: Signal, *, target: str = "labels", label_smoothing: float = 0.0, name: str | None = None
    ) -> None:
        super().__init__(name=name, student=student)
        self.target = target
        self.label_smoothing = label_smoothing

    def compute(self, *, student: Tensor, batch: Batch, **_: Any) -> Tensor:
        if self.target not in batch:
            raise KeyError(f"{self.name}: the batch has no {self.target!r}; it has: {', '.join(batch)}")
        logits_NV, labels_N = student.flatten(0, -2), batch[self.target].flatten()
        loss = F.cross_entropy(logits_NV.float(), labels_N, label_smoothing=self.label_smoothing)
        return loss.where((labels_N != IGNORE_INDEX).any(), 0.0)  # a mean over nothing is no number


class LogitMatch(Term):
    """A divergence between the logits of ``student`` and ``teacher``, both (B, ..., V); the teacher gets no gradient.

    Args:
        divergence: one of `stillhouse.losses.divergences`, or a callable that gives a loss per row.
        weight: an entry of the batch with a weight or mask per row (B, ...), or a function of the batch.
        labels: the entry of the batch that a divergence gets which asks for labels (`stillhouse.losses.target_split`):
            (B, ...), -100 is left out; or distributions (B, ..., V), whose likeliest class counts.
        scheduled: fields of ``divergence`` that follow a schedule: ``temperature=linear(4.0, 1.0)``.
    """

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        divergence: RowDivergence,
        *,
        weight: str | Callable[[Batch], Tensor] | None = None,
        labels: str = "labels",
        name: str | None = None,
        **scheduled: Scheduled,
    ) -> None:
        super().__init__(name=name or type(divergence).__name__, student=student, teacher=teacher.detach())
        self.divergence = ScheduledDivergence(divergence, **scheduled)
        self.weight = weight
        self.labels = labels

    def compute(self, *, student: Tensor, teacher: Tensor, batch: Batch, progress: Progress, **_: Any) -> Tensor:
        weight = self.weight(batch) if callable(self.weight) else batch[self.weight] if self.weight else None
        divergence = self.divergence.now(self, progress)
        if isinstance(divergence, LabelledDivergence):
            if self.labels not in batch:
                raise KeyError(f"{self.name}: the batch has no {self.labels!r}; it has: {', '.join(batch)}")
            labels = batch[self.labels]
            labels = labels.argmax(-1) if labels.is_floating_point() else labels
            known = labels != IGNORE_INDEX
            weight = known if weight is None else weight * known
            divergence = divergence.given(labels.where(known, 0))
        loss = reduce(divergence(*align_vocabulary(student, teacher)), weight=weight)
        self.divergence.record(loss, progress)
        return loss


class KLDivergence(LogitMatch):
    """Forward KL(teacher || student) of softened logits, times T^2 (Hinton et al., 2015, arXiv 1503.02531)."""

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        *,
        temperature: Scheduled = 1.0,
        weight: str | Callable[[Batch], Tensor] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            student, teacher, ForwardKL(), weight=weight, name=name or "KLDivergence", temperature=temperature
        )
