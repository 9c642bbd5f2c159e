"""Losses on pairs of a better (w) and a worse (l) response, and on lists of ranked ones.

Shapes: P pairs (or prompts), K responses to a prompt, N tokens. ``logp`` is the sum of the log-probabilities of a
response's tokens, ``length`` their number; ``mean`` is the first over the second.
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


def pairwise_loss(score_w_P: Tensor, score_l_P: Tensor) -> Tensor:
    """Bradley-Terry: -log sigmoid(s_w - s_l), per pair: (P). What reward models are trained with."""
    return -F.logsigmoid(score_w_P - score_l_P)


def rrhf_loss(mean_PK: Tensor, reward_PK: Tensor) -> Tensor:
    """RRHF (Yuan et al., 2023, arXiv 2304.05302, eq. 2): sum over r_i < r_j of max(0, p_i - p_j), per prompt: (P).

    The paper adds the cross-entropy of the best response. Equal rewards ask for nothing.
    """
    worse_PKK = reward_PK[:, :, None] < reward_PK[:, None, :]
    over_PKK = (mean_PK[:, :, None] - mean_PK[:, None, :]).clamp(min=0)
    return (over_PKK * worse_PKK).sum((1, 2))


def pro_loss(mean_PK: Tensor, reward_PK: Tensor, *, by_reward: bool = True) -> Tensor:
    """PRO (Song et al., AAAI 2024, arXiv 2306.17492, eq. 7 to 9), per prompt: (P); the best first, each against those
    below it: -sum_k log of exp(p_k / T_k) over the sum of exp(p_i / T_i) for i >= k.

    The paper adds the cross-entropy of the best response.

    Args:
        by_reward: 1 / T_i = r_k - r_i, the difference in reward, and 1 / T_k the largest of them. Without, all T are 1:
            the likelihood of the order itself (Plackett-Luce).
    """
    reward_PK, order_PK = reward_PK.sort(dim=1, descending=True, stable=True)
    mean_PK = mean_PK.gather(1, order_PK)
    losses = []
    for k in range(mean_PK.shape[1] - 1):
        scale_PK = torch.ones_like(mean_PK[:, k:])
        if by_reward:
            below_PK = reward_PK[:, k : k + 1] - reward_PK[:, k + 1 :]
            scale_PK = torch.cat([below_PK.amax(1, keepdim=True), below_PK], 1)
        losses.append(-(scale_PK * mean_PK[:, k:]).log_softmax(1)[:, 0])
    return torch.stack(losses).sum(0)
