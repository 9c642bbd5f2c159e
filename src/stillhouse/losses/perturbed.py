"""Teachers that are disturbed on purpose, to see how much of what they say matters.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.losses.divergences import RowDivergence, value_and_grad


@dataclass(frozen=True)
class NoisyTeacher:
    """``divergence`` to a teacher whose logits are z + sigma e, e ~ N(0, 1) drawn anew every time.

    The noise comes from torch's global generator. sigma = 0 is the divergence itself, and draws nothing.
    """

    divergence: RowDivergence
    sigma: float

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        return self.divergence(student_logits_NV, self._noisy(teacher_logits_NV))

    def value_and_grad(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        noisy_NV = self._noisy(teacher_logits_NV)
        return value_and_grad(self.divergence, student_logits_NV, noisy_NV, overwrite=overwrite)

    def _noisy(self, logits_NV: Tensor) -> Tensor:
        return logits_NV if self.sigma == 0 else logits_NV + self.sigma * torch.randn_like(logits_NV)
