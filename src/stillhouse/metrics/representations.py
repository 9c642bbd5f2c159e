"""How alike two models' hidden states are, whatever rotation lies between them. Shapes: N tokens, D and E widths."""

from __future__ import annotations

import torch
from torch import Tensor


def procrustes_match(one_ND: Tensor, other_NE: Tensor) -> float:
    """Cosine of two sets of states after the best orthogonal map between them: tr(S) / (|A| |B|), at most 1.

    Rows are scaled to length 1; S are the singular values of B^T A (orthogonal Procrustes; Schönemann, 1966).
    """
    A, B = (torch.nn.functional.normalize(states.double(), dim=-1) for states in (one_ND, other_NE))
    return float(torch.linalg.svdvals(B.T @ A).sum() / (A.norm() * B.norm()))


def linear_cka(one_ND: Tensor, other_NE: Tensor) -> float:
    """|B^T A|^2 / (|A^T A| |B^T B|) of centred states (Kornblith et al., 2019, arXiv 1905.00414), in [0, 1]."""
    A, B = (states.double() - states.double().mean(0) for states in (one_ND, other_NE))
    return float((B.T @ A).square().sum() / ((A.T @ A).norm() * (B.T @ B).norm()))
