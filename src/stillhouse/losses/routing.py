"""Losses on the routing of a mixture of experts. Shapes: N tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balance(logits_NE: Tensor, *, active: int) -> tuple[Tensor, Tensor]:
    """(loss, share of the assignments of each expert (E)): E sum_e f_e P_e (Fedus et al., 2022, arXiv 2101.03961).

    f_e is the share of assignments that go to expert e, P_e its mean probability: 1 if all are alike, E if one expert
    gets all.
    """
    experts = logits_NE.shape[-1]
    chosen = logits_NE.topk(active, dim=-1).indices
    shares_E = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    mean_E = logits_NE.float().softmax(-1).mean(0)
    return experts * (shares_E * mean_E).sum(), shares_E
