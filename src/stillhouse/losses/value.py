"""Losses of a critic, token by token.

Shapes: N response tokens of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """max((V - R)^2, (V_clipped - R)^2) / 2 with V within ``clip`` of what it was when the tokens were written: (N).

    The value loss of PPO's authors' code (Schulman et al., 2017, arXiv 1707.06347); None does not clip.
    """
    loss_N = (value_N - return_N).square()
    if clip is not None:
        near_N = old_value_N + (value_N - old_value_N).clamp(-clip, clip)
        loss_N = torch.maximum(loss_N, (near_N - return_N).square())
    return loss_N / 2
