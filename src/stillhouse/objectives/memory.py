"""Terms that remember: what a model said of every sample when it last saw it, or at the end of the last epoch.

Shapes: B batch, N samples of the training set, V classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed, Signal, Turn
from stillhouse.core.schedule import Progress, Schedule, Scheduled


@dataclass(frozen=True)
class ByEpoch(Schedule):
    """``end * t / epochs`` in the t-th of ``epochs`` passes over the data, counted from 1."""

    end: float
    epochs: int

    def __call__(self, progress: Progress) -> float:
        return self.end * min(1.0, (progress.epoch + 1) / self.epochs)


@dataclass(frozen=True)
class FromSecondEpoch(Schedule):
    """Another schedule, but 0 in the first pass over the data, in which there is no past opinion."""

    later: Schedule

    def __call__(self, progress: Progress) -> float:
        return self.later(progress) if progress.epoch else 0.0


@dataclass(frozen=True)
class Rest(Schedule):
    """1 less another schedule."""

    other: Schedule

    def __call__(self, progress: Progress) -> float:
        return 1.0 - self.other(progress)


class PredictionMemory(nn.Module):
    """The last probabilities a model gave each sample of a training set, by the sample's index; saved with the run.

    With several processes each keeps the whole table: what is remembered is gathered from all.

    Args:
        samples, classes: size of the table.
        dtype: ``torch.float16`` halves its memory.
    """

    table: Tensor
    seen: Tensor

    def __init__(self, samples: int, classes: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(samples, classes, dtype=dtype))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.bool))

    def recall(self, index_B: Tensor, unseen_BV: Tensor) -> Tensor:
        """What is remembered of these samples, (B, V); of samples not met yet, the rows of ``unseen_BV``."""
        known_BV = self.table[index_B].to(unseen_BV.dtype)
        return torch.where(self.seen[index_B, None], known_BV, unseen_BV)

    @torch.no_grad()
    def remember(self, index_B: Tensor, probabilities_BV: Tensor) -> None:
        """Replace what is remembered of these samples."""
        index_B, probabilities_BV = of_all_processes(index_B), of_all_processes(probabilities_BV.to(self.table.dtype))
        self.table[index_B] = probabilities_BV
        self.seen[index_B] = True


def of_all_processes(tensor_B: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; each process has as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor_B
    pieces = [torch.empty_like(tensor_B) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(pieces, tensor_B.contiguous())
    return torch.cat(pieces)


class Snapshot(nn.Module):
    """A frozen copy of a model, renewed at the beginning of every pass over the data; saved with the run.

    Args:
        model: its weights stay its player's.
    """

    begun: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = [model]  # in a list: no part of this one
        self.module = copy.deepcopy(model)
        self.observed = Observed(self.module, frozen=True, name="snapshot")
        self.register_buffer("begun", torch.zeros((), dtype=torch.int64))  # the epoch the snapshot is for

    def follow(self, progress: Progress) -> None:
        """Become what the model is now, if a pass has ended since."""
        if progress.epoch > int(self.begun):
            self.begun.fill_(progress.epoch)
            self.module.load_state_dict(self.model[0].state_dict())


class RefinedTargets(Term):
    """Cross-entropy to (1 - alpha) y + alpha P, P what the model said before (PS-KD, Kim et al., 2021, eq. 3).

    ``y`` is the label of ``batch["labels"]``, smoothed by ``label_smoothing``. A subclass says where P comes from.
    """

    def __init__(
        self, *, alpha: Scheduled, label_smoothing: float = 0.0, name: str = "PSKD", **signals: Signal
    ) -> None:
        super().__init__(name=name, **signals)
        self.alpha = alpha
        self.label_smoothing = label_smoothing

    def target(self, labels_B: Tensor, classes: int) -> Tensor:
        """The labels as distributions, (B, V)."""
        hard_BV = F.one_hot(labels_B, classes).float()
        return (1 - self.label_smoothing) * hard_BV + self.label_smoothing / classes

    def refined(self, y_BV: Tensor, P_BV: Tensor, progress: Progress) -> Tensor:
        """(1 - alpha) y + alpha P."""
        alpha = self.at(self.alpha, progress)
        return (1 - alpha) * y_BV + alpha * P_BV

    @staticmethod
    def cross_entropy(q_BV: Tensor, logits_BV: Tensor) -> Tensor:
        """Mean over the batch of -sum q log softmax(logits)."""
        return -(q_BV * logits_BV.float().log_softmax(-1)).sum(-1).mean()


class RememberedTargets(RefinedTargets):
    """P is what the model said of the sample when it last met it; of a sample it has not met, the label.

    ``batch["index"]`` (B,) says which samples they are. What the model says now is remembered after it was used.
    """

    def __init__(
        self,
        student: Signal,
        memory: PredictionMemory,
        *,
        alpha: Scheduled,
        label_smoothing: float = 0.0,
        name: str = "PSKD",
    ) -> None:
        super().__init__(alpha=alpha, label_smoothing=label_smoothing, name=name, student=student)
        self.memory = memory

    def compute(self, *, student: Tensor, batch: Batch, progress: Progress, **_: Any) -> Tensor:
        y_BV = self.target(batch["labels"], student.shape[-1])
        q_BV = self.refined(y_BV, self.memory.recall(batch["index"], y_BV), progress)
        if self.training:
            self.memory.remember(batch["index"], student.detach().float().softmax(-1))
        return self.cross_entropy(q_BV, student)


class SnapshotTargets(RefinedTargets):
    """P is what the model of the end of the last epoch says of the very same input; in the first epoch, the label.

    Twice the forwards of `RememberedTargets`, no table, and the same augmentation for both. The snapshot is a part of
    the term and is saved with the run.
    """

    def __init__(
        self,
        student: Observed,
        *,
        output: str | None = "logits",
        alpha: Scheduled,
        label_smoothing: float = 0.0,
        name: str = "PSKD",
    ) -> None:
        past = Snapshot(student.module)
        now, before = student.output(output), past.observed.output(output).detach()
        super().__init__(alpha=alpha, label_smoothing=label_smoothing, name=name, student=now, before=before)
        self.past = past

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        if self.training:
            self.past.follow(progress)
        return super().evaluate(turn, batch, progress)

    def compute(self, *, student: Tensor, before: Tensor, batch: Batch, progress: Progress, **_: Any) -> Tensor:
        y_BV = self.target(batch["labels"], student.shape[-1])
        P_BV = before.float().softmax(-1) if progress.epoch else y_BV
        return self.cross_entropy(self.refined(y_BV, P_BV, progress), student)
