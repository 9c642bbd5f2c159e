"""Advantages of tokens from a critic's values.

Shapes: B responses, T tokens of the longest, N tokens of all. ``row`` (N) says which response a token belongs to and
does not fall; every response ends an episode.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shaped_rewards(reward_B: Tensor, logp_N: Tensor, ref_logp_N: Tensor, row_N: Tensor, *, kl: float) -> Tensor:
    """r_t = -kl log(pi / ref), and the response's reward on its last token: (N) (Ouyang et al., 2022, 2203.02155)."""
    shaped_N = -kl * (logp_N - ref_logp_N)
    last_N = torch.ones_like(row_N, dtype=torch.bool)
    last_N[:-1] = row_N[1:] != row_N[:-1]
    return shaped_N + reward_B[row_N] * last_N


def generalised_advantages(
    reward_N: Tensor, value_N: Tensor, row_N: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantages, returns): A_t = sum_k (gamma lam)^k delta_{t+k}, delta = r + gamma V' - V; R = A + V: (N), (N).

    V' is the value of the next token's state, 0 after the last one (Schulman et al., 2016, arXiv 1506.02438, eq. 16).
    ``lam`` 1: Monte Carlo minus the value; 0: one step.
    """
    length_B = torch.bincount(row_N)
    start_B = length_B.cumsum(0) - length_B
    place_N = torch.arange(len(row_N), device=row_N.device) - start_B[row_N]
    next_value_N = torch.zeros_like(value_N)
    next_value_N[:-1] = value_N[1:] * (row_N[1:] == row_N[:-1])
    delta_BT = value_N.new_zeros(len(length_B), int(length_B.max()) if len(length_B) else 0)
    delta_BT[row_N, place_N] = reward_N + gamma * next_value_N - value_N
    advantage_BT, running_B = torch.zeros_like(delta_BT), value_N.new_zeros(len(length_B))
    for t in reversed(range(delta_BT.shape[1])):  # behind a response's end all deltas are 0
        running_B = delta_BT[:, t] + gamma * lam * running_B
        advantage_BT[:, t] = running_B
    advantage_N = advantage_BT[row_N, place_N]
    return advantage_N, advantage_N + value_N


def whitened(value_N: Tensor, eps: float = 1e-8) -> Tensor:
    """Moved and scaled to mean 0 and variance 1."""
    centred_N = value_N - value_N.mean()
    return centred_N / (centred_N.square().mean().sqrt() + eps)
