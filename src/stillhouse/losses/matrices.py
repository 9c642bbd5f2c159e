"""Distances between the ways two models mix tokens, and between what their layers give.

Shapes: B sequences, T tokens, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frobenius_distance(student_BHTT: Tensor, teacher_BHTT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """||M - A||_F of each T x T matrix, not squared, mean over sequences and heads (Bick et al., 2024, stage 1).

    Rows of tokens with a mask of 0 count nothing.
    """
    difference_BHTT = student_BHTT - teacher_BHTT
    if mask_BT is not None:
        difference_BHTT = difference_BHTT * mask_BT[:, None, :, None]
    return torch.linalg.matrix_norm(difference_BHTT, ord="fro").mean()


def token_distance(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """||student - teacher||_2 over channels, mean over tokens with a mask of 1 (Bick et al., 2024, stage 2)."""
    distance_BT = torch.linalg.vector_norm(student_BTD - teacher_BTD, dim=-1)
    if mask_BT is None:
        return distance_BT.mean()
    return (distance_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
