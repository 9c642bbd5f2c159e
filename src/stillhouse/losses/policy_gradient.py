"""Policy-gradient losses, token by token, and how they are averaged.

Shapes: N response tokens of a batch, B responses. ``row`` (N) says which response a token belongs to; what varies by
response and is needed by token is gathered first (``advantage_B[row_N]``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Normalisation = Literal["sequence", "token", "constant"]


def clipped_surrogate(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) with rho = pi / pi_old: (N).

    The clipped objective of PPO (Schulman et al., 2017, arXiv 1707.06347, eq. 7) as GRPO uses it (Shao et al., 2024,
    arXiv 2402.03300, eq. 3); ``clip_high`` above ``clip_low``: clip-higher of DAPO (Yu et al., 2025, arXiv 2503.14476).
    """
    rho_N = torch.exp(logp_N - old_logp_N)
    clipped_N = rho_N.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(rho_N * advantage_N, clipped_N * advantage_N)


def truncated_ratio(logp_N: Tensor, old_logp_N: Tensor, *, limit: float) -> Tensor:
    """min(pi / pi_old, limit) without gradient: the weight of tokens that an older policy wrote (N)."""
    return torch.exp((logp_N - old_logp_N).detach()).clamp(max=limit)


def kl_to_reference(logp_N: Tensor, ref_logp_N: Tensor, *, estimator: Estimator = "k3") -> Tensor:
    """KL(pi || ref) estimated from tokens that pi wrote: (N) (Schulman, 2020, Approximating KL divergence).

    With r = ref / pi: k1 = -log r, unbiased, of either sign; k2 = (log r)^2 / 2, biased, not negative; k3 =
    r - 1 - log r, unbiased, not negative. Unbiased are the values; of the gradients through ``logp`` k2's is.
    """
    log_r_N = ref_logp_N - logp_N
    if estimator == "k1":
        return -log_r_N
    if estimator == "k2":
        return log_r_N.square() / 2
    return torch.expm1(log_r_N) - log_r_N


def average_tokens(
    loss_N: Tensor, row_N: Tensor, rows: int, *, how: Normalisation = "sequence", constant: float | None = None
) -> Tensor:
    """One number from token losses.

    - ``sequence``: 1/B sum_i 1/|y_i| sum_t (GRPO, arXiv 2402.03300): a token of a long response counts less.
    - ``token``: sum over all tokens / their number (DAPO, arXiv 2503.14476).
    - ``constant``: 1/B sum_i 1/L sum_t with a fixed L (Dr. GRPO, Liu et al., 2025, arXiv 2503.20783); ``constant`` is
      L, as a rule the longest response allowed.
    """
    if how == "token":
        return loss_N.sum() / max(1, len(loss_N))
    if how == "constant":
        if constant is None:
            raise ValueError("the constant normalisation needs its constant, such as the longest response allowed")
        return loss_N.sum() / (rows * constant)
    length_B = torch.bincount(row_N, minlength=rows)
    return (loss_N / length_B[row_N]).sum() / rows


def later_in_row(values_N: Tensor, row_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, number) of the values that come after each one in its own row: (N), (N). ``row_N`` does not fall."""
    if not len(values_N):
        return values_N, values_N
    length_B = torch.bincount(row_N)
    end_N = length_B.cumsum(0)[row_N]  # one past the last value of the row
    place_N = torch.arange(len(values_N), device=values_N.device)
    upto_N = values_N.double().cumsum(0)
    later_N = upto_N[end_N - 1] - upto_N
    return later_N.to(values_N.dtype), (end_N - 1 - place_N).to(values_N.dtype)
