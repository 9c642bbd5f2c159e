"""Terms that serve to choose samples: what a network forgets, and features learnt without labels.

Shapes: B batch, N samples of the training set, D width, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal
from stillhouse.losses.contrastive import nt_xent
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.memory import of_all_processes


class ForgettingCount(CrossEntropy):
    """`CrossEntropy` that counts, sample by sample, how often the network forgets what it had right.

    ``batch["index"]`` (B,) says which samples they are. The counts are buffers, saved with the run; with several
    processes each has those of all.
    """

    flips: Tensor
    was_right: Tensor
    ever_right: Tensor
    looks: Tensor

    def __init__(self, student: Signal, samples: int, *, name: str = "CrossEntropy") -> None:
        super().__init__(student, name=name)
        self.register_buffer("flips", torch.zeros(samples, dtype=torch.int64))
        self.register_buffer("was_right", torch.zeros(samples, dtype=torch.bool))
        self.register_buffer("ever_right", torch.zeros(samples, dtype=torch.bool))
        self.register_buffer("looks", torch.zeros((), dtype=torch.int64))

    def compute(self, *, student: Tensor, batch: Batch, **inputs: Any) -> Tensor:
        if self.training:
            right_B = student.detach().argmax(-1) == batch["labels"]
            index_B, right_B = of_all_processes(batch["index"]), of_all_processes(right_B.long()).bool()
            self.flips[index_B] += self.was_right[index_B] & ~right_B
            self.was_right[index_B] = right_B
            self.ever_right[index_B] |= right_B
            self.looks += 1
        return super().compute(student=student, batch=batch, **inputs)

    def score(self) -> Tensor:
        """Times forgotten, (N,); a sample that was never right counts more than any other."""
        return torch.where(self.ever_right, self.flips.double(), self.looks.double())


class ContrastiveFeatures(Term):
    """`nt_xent` between features (B, D) of two views of the same images, behind a small network of its own (SimCLR)."""

    def __init__(
        self,
        first: Signal,
        second: Signal,
        *,
        width: int = 128,
        temperature: float = 0.5,
        name: str = "NT-Xent",
    ) -> None:
        super().__init__(name=name, first=first, second=second)
        self.temperature = temperature
        self.head = nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, width))

    def compute(self, *, first: Tensor, second: Tensor, **_: Any) -> Tensor:
        return nt_xent(self.head(first.flatten(1)), self.head(second.flatten(1)), temperature=self.temperature)
