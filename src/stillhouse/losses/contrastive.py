"""Contrastive losses. Shapes: B pairs, D width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first_BD: Tensor, second_BD: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Tell each sample's other view from all other views in the batch: a scalar (SimCLR, Chen et al., 2020,
    arXiv 2002.05709, equation 1). Similarities are cosines over ``temperature``.
    """
    both_ND = F.normalize(torch.cat([first_BD, second_BD]).float(), dim=-1)
    count = len(first_BD)
    similar_NN = (both_ND @ both_ND.T / temperature).fill_diagonal_(-math.inf)
    other_N = torch.arange(2 * count, device=both_ND.device).roll(count)
    return F.cross_entropy(similar_NN, other_N)
