"""Losses on pairs of a better (w) and a worse (l) response.

Shapes: P pairs, N tokens. ``logp`` is the sum of the log-probabilities of a response's tokens, ``length`` their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sums_by_row(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Sum of the values that belong to each of ``rows`` rows: (rows)."""
    return values_N.new_zeros(rows).index_add(0, row_N, values_N)


def redi_loss(
    logp_w_P: Tensor,
    length_w_P: Tensor,
    logp_l_P: Tensor,
    length_l_P: Tensor,
    *,
    alpha: float = 0.8,
    gamma_n: float = 0.0,
) -> Tensor:
    """REDI (Xu et al., 2025, arXiv 2505.24850): -log pi(y_w)/|y_w| + alpha log pi(y_l)/|y_l|, per pair: (P).

    ``alpha`` 0 learns from the better responses alone; 1 is symmetric. ``gamma_n`` (the authors' code, off in the
    paper) multiplies the negative term by exp(gamma_n log pi(y_l)/|y_l|), which fades it as y_l becomes unlikely.
    """
    mean_w_P, mean_l_P = logp_w_P / length_w_P.clamp(min=1), logp_l_P / length_l_P.clamp(min=1)
    negative_P = mean_l_P * torch.exp(gamma_n * mean_l_P) if gamma_n else mean_l_P
    return -mean_w_P + alpha * negative_P


def dpo_loss(logp_w_P: Tensor, logp_l_P: Tensor, ref_w_P: Tensor, ref_l_P: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO (Rafailov et al., 2023, arXiv 2305.18290, eq. 7), per pair: (P)."""
    return -F.logsigmoid(beta * ((logp_w_P - ref_w_P) - (logp_l_P - ref_l_P)))


def simpo_loss(
    logp_w_P: Tensor,
    length_w_P: Tensor,
    logp_l_P: Tensor,
    length_l_P: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """SimPO (Meng et al., 2024, arXiv 2405.14734, eq. 6), per pair: (P). ``gamma`` is the margin between the two."""
    margin_P = logp_w_P / length_w_P.clamp(min=1) - logp_l_P / length_l_P.clamp(min=1)
    return -F.logsigmoid(beta * margin_P - gamma)
