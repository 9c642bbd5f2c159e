"""Divergences whose direction is chosen row by row.

Shapes: N rows (any leading shape), V classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.losses.divergences import ForwardKL, ReverseKL


@dataclass(frozen=True, kw_only=True)
class EntropyBalancedKL:
    """a KL(p || q) + b KL(q || p), p the teacher and q the student (BD-KD, Amara et al., 2022, arXiv 2212.12965).

    Where the student's entropy is above the teacher's (it is less confident) the reverse KL, which sharpens, has the
    weight b = ``nu`` and a = 1; elsewhere the forward KL, which flattens, has a = ``nu`` and b = 1. Entropies are those
    of the softened distributions; the weights take no gradient. ``nu`` = 1 is the symmetric KL.

    Raises ``ValueError`` unless ``nu`` > 0 and ``temperature`` > 0.
    """

    nu: float = 2.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.nu > 0:
            raise ValueError(f"nu must be a positive number, got {self.nu}")
        self._directions()

    def _directions(self) -> tuple[ForwardKL, ReverseKL]:
        return ForwardKL(temperature=self.temperature), ReverseKL(temperature=self.temperature)

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        forward, reverse = self._directions()
        unsure_N = entropy_gap(student_logits_NV, teacher_logits_NV, temperature=self.temperature) > 0
        kl_forward_N = forward(student_logits_NV, teacher_logits_NV)
        kl_reverse_N = reverse(student_logits_NV, teacher_logits_NV)
        one_N = torch.ones_like(kl_forward_N)
        a_N, b_N = torch.where(unsure_N, one_N, self.nu), torch.where(unsure_N, self.nu, one_N)
        return a_N * kl_forward_N + b_N * kl_reverse_N


@torch.no_grad()
def entropy_gap(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """H(q) - H(p) of every row, nats: above 0 the student is less confident. (..., V), (..., V) -> (...)."""

    def entropy(logits_NV: Tensor) -> Tensor:
        log_NV = (logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature).log_softmax(-1)
        return -(log_NV.exp() * log_NV).sum(-1)

    return entropy(student_logits_NV) - entropy(teacher_logits_NV)
