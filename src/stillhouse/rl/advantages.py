"""Advantages from the rewards of several responses to the same prompt, and which loss each response goes to.

Shapes: P prompts, G responses to each. None of them needs a value model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["group", "group-mean", "leave-one-out"]
Routing = Literal["srpo", "grpo", "sdpo", "mix"]


def group_relative(rewards_PG: Tensor, *, std: bool = True, eps: float = 1e-6) -> Tensor:
    """(R - mean) / (std + eps) within each group (GRPO, arXiv 2402.03300); ``std=False``: R - mean (Dr. GRPO).

    The standard deviation is the sample's (G - 1 below the sum). A group of equal rewards, or of one, gets zeros.
    """
    centred_PG = rewards_PG - rewards_PG.mean(-1, keepdim=True)
    if not std or rewards_PG.shape[-1] < 2:
        return centred_PG
    return centred_PG / (rewards_PG.std(-1, keepdim=True) + eps)


def leave_one_out(rewards_PG: Tensor) -> Tensor:
    """R minus the mean of the other responses of the group (RLOO, Ahmadian et al., 2024, arXiv 2402.14740)."""
    G = rewards_PG.shape[-1]
    if G < 2:
        raise ValueError("leave-one-out needs at least 2 responses to a prompt")
    return rewards_PG - (rewards_PG.sum(-1, keepdim=True) - rewards_PG) / (G - 1)


def advantages(rewards_PG: Tensor, how: Advantage = "group") -> Tensor:
    """The advantages by name: ``group`` and ``group-mean`` are `group_relative` with and without its std."""
    return leave_one_out(rewards_PG) if how == "leave-one-out" else group_relative(rewards_PG, std=how == "group")


def has_guide(correct_PG: Tensor) -> Tensor:
    """m: whether another response of the same group is correct: bool (P, G)."""
    return (correct_PG.sum(-1, keepdim=True) - correct_PG.long()) > 0


def route(correct_PG: Tensor, guided_PG: Tensor, how: Routing = "srpo", *, mix: float = 0.9) -> tuple[Tensor, Tensor]:
    """Weights (z^G, z^S) of the group-relative and the self-distillation loss of each response: two of (P, G).

    - ``srpo``: failed responses with a guide (a correct sibling or feedback) are distilled, z^S = (1 - c) m; all
      others, z^G = 1 - z^S (Li et al., 2026, arXiv 2604.02288).
    - ``grpo``: everything group-relative. ``sdpo``: everything that has a guide distilled, correct ones too.
    - ``mix``: both for all, ``mix`` and 1 - ``mix``; without a guide only the first.
    """
    guided = guided_PG.float()
    if how == "srpo":
        distilled = (~correct_PG.bool()).float() * guided
        return 1 - distilled, distilled
    if how == "grpo":
        return torch.ones_like(guided), torch.zeros_like(guided)
    if how == "sdpo":
        return torch.zeros_like(guided), guided
    return torch.full_like(guided, mix), (1 - mix) * guided
