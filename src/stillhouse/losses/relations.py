"""Self-attention relations: how the tokens of a sequence relate to each other in a layer's queries, keys or values.

They compare models of different widths and numbers of heads: vectors (B, T, D) are cut anew into R relation heads of
width d = floor(D / R), and X X^T / sqrt(d) is (B, R, T, T) whatever D was (Wang et al., 2021, MiniLMv2,
arXiv 2012.15828; Xu et al., 2022, AutoDistil, arXiv 2201.12507).

Shapes: B sequences, T tokens, D width, R relation heads, d width of one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relation_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """(B, T, D) as (B, R, T, d); channels that do not fill a head are cut off."""
    width = x_BTD.shape[-1] // heads
    if width == 0:
        raise ValueError(f"{x_BTD.shape[-1]} channels cannot be cut into {heads} relation heads; use fewer")
    return x_BTD[..., : heads * width].unflatten(-1, (heads, width)).transpose(-3, -2)


def relations(x_BTD: Tensor, heads: int) -> Tensor:
    """X X^T / sqrt(d), head by head: (B, R, T, T), not normalised."""
    x_BRTd = relation_heads(x_BTD, heads)
    return x_BRTd @ x_BRTd.transpose(-1, -2) / x_BRTd.shape[-1] ** 0.5


def relation_mse(student_BTD: Tensor, teacher_BTD: Tensor, *, heads: int, mask_BT: Tensor | None = None) -> Tensor:
    """Mean squared difference of the unnormalised relations, over pairs of real tokens (the released form)."""
    square_BRTT = (relations(student_BTD, heads) - relations(teacher_BTD, heads)).square()
    if mask_BT is None:
        return square_BRTT.mean()
    pairs_BTT = mask_BT[:, :, None] * mask_BT[:, None, :]
    return (square_BRTT * pairs_BTT[:, None]).sum() / (heads * pairs_BTT.sum()).clamp(min=1)


def relation_kl(student_BTD: Tensor, teacher_BTD: Tensor, *, heads: int, mask_BT: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the relations normalised over tokens, mean over heads and tokens (the paper's form)."""
    scores = [relations(x, heads) for x in (teacher_BTD, student_BTD)]
    if mask_BT is not None:
        scores = [s.masked_fill(mask_BT[:, None, None, :] == 0, torch.finfo(s.dtype).min) for s in scores]
    log_p, log_q = (s.log_softmax(-1) for s in scores)
    kl_BRT = (log_p.exp() * (log_p - log_q)).sum(-1)
    if mask_BT is None:
        return kl_BRT.mean()
    return (kl_BRT * mask_BT[:, None]).sum() / (heads * mask_BT.sum()).clamp(min=1)
