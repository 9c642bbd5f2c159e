"""Losses on attention scores, attention probabilities and hidden states of padded sequences.

Suffixes: B sequences, T tokens, H heads, D width; ``mask_BT`` is 1 on tokens and 0 on padding, None: no padding.
"""

from __future__ import annotations

from torch import Tensor


def attention_scores(query_BTD: Tensor, key_BTD: Tensor, *, heads: int) -> Tensor:
    """Unnormalised attention scores q k^T / sqrt(d), d the width of a head: (B, H, T, T)."""
    query, key = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query_BTD, key_BTD))
    return query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5


def attention_probabilities(scores_BHTT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Softmax of scores over the real tokens; padding gets exactly 0."""
    if mask_BT is not None:
        scores_BHTT = scores_BHTT.masked_fill(mask_BT[:, None, None, :] == 0, float("-inf"))
    return scores_BHTT.softmax(-1)


def pair_mask(mask_BT: Tensor) -> Tensor:
    """1 where both tokens of a pair are real: (B, 1, T, T)."""
    return (mask_BT[:, :, None] * mask_BT[:, None, :])[:, None]


def zeroed_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over all places, with both sides 0 on padding; ``mask`` broadcasts to them."""
    square = (student - teacher).float().square()
    return (square if mask is None else square * mask).mean()


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the places that are no padding; ``mask`` broadcasts to them."""
    square = (student - teacher).float().square()
    if mask is None:
        return square.mean()
    kept = mask.expand_as(square)
    return (square * kept).sum() / kept.sum().clamp(min=1)
