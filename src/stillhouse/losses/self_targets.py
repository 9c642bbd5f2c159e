"""Soft labels that a classifier makes for itself: a smoothed target, and Zipf's law for the rest.

Shapes: N rows (images or tokens; any leading shape), V classes or vocabulary entries, K targets of a row.
q = softmax(logits), w = softmax of a weakly supervised head on an inner feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.losses.divergences import log_softmax, reduce
from stillhouse.losses.target_split import Labelled, nontarget_cross_entropy, nontarget_log_softmax

EPSILON = 1e-6


@torch.no_grad()
def smoothed_target(q_y_N: Tensor, *, value_N: Tensor | None = None, weight_N: Tensor | None = None) -> Tensor:
    """q_y^2 + V - mean(q_y^2), without gradient: (N) -> (N) (USKD, Yang et al., 2023, arXiv 2303.13005).

    V is the label's share in the target (``value_N``; by default 1), and where it is 0 so is the result. The mean is
    over all rows, with ``weight_N``, so that the mean of the result is that of V.
    """
    square_N = q_y_N.square()
    value_N = torch.ones_like(square_N) if value_N is None else value_N
    return (square_N + value_N - reduce(square_N, weight=weight_N)).masked_fill(value_N == 0, 0.0)


@torch.no_grad()
def rank_scores(w_NV: Tensor, q_NV: Tensor, target_NV: Tensor) -> Tensor:
    """w / (1 - w_y) + q / (1 - q_y): both heads' opinions of the others, on one scale; (..., V) twice -> (..., V)."""

    def share(x_NV: Tensor) -> Tensor:
        return x_NV / (1 - (x_NV * target_NV).sum(-1, keepdim=True) + EPSILON)

    return share(w_NV) + share(q_NV)


@torch.no_grad()
def zipf_labels(score_NV: Tensor, target_NV: Tensor) -> Tensor:
    """z^: each non-target gets 1 / its rank among all classes, renormalised without the targets; 0 at the targets.

    Rank 1 has the highest score; equal scores keep the order of the classes.
    """
    order_NV = score_NV.argsort(dim=-1, descending=True, stable=True)
    zipf_V = 1 / torch.arange(1, score_NV.shape[-1] + 1, device=score_NV.device, dtype=score_NV.dtype)
    z_NV = torch.empty_like(score_NV).scatter_(-1, order_NV, zipf_V.expand_as(score_NV))
    z_NV = z_NV.masked_fill_(target_NV, 0.0)
    return z_NV / z_NV.sum(-1, keepdim=True)


def nontarget_zipf(logits_NV: Tensor, weak_logits_NV: Tensor, target_NV: Tensor) -> Tensor:
    """-sum over the non-targets of z^ log q^: (..., V) -> (...); z^ takes no gradient."""
    w_NV, q_NV = (log_softmax(x_NV.detach()).exp() for x_NV in (weak_logits_NV, logits_NV))
    z_NV = zipf_labels(rank_scores(w_NV, q_NV, target_NV), target_NV)
    return nontarget_cross_entropy(nontarget_log_softmax(logits_NV, target_NV), z_NV, target_NV)


@dataclass(frozen=True, kw_only=True, eq=False)
class ZipfNonTargets(Labelled):
    """`nontarget_zipf` as a row divergence: the "teacher" is the weak head of the student itself.

    Raises ``ValueError`` when called without labels.
    """

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        z_NV, w_NV, target_NV = self._raised(student_logits_NV, teacher_logits_NV)
        return nontarget_zipf(z_NV, w_NV, target_NV)
