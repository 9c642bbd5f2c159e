"""Distances between features' directions. Suffixes: B batch, T tokens, D channels."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def feature_distance(
    student_BTD: Tensor, teacher_BTD: Tensor, *, power: Literal[1, 2] = 1, directions: bool = True
) -> Tensor:
    """Mean over all elements of |s - t| (``power=1``) or (s - t)^2, a scalar.

    ``directions``: of features scaled to unit length over the channels; the lengths then do not count, and the
    distance is at most 2 / sqrt(D) for ``power=1`` (DMAE, Bai et al., 2023, arXiv 2208.12256).
    """
    s_BTD, t_BTD = student_BTD.float(), teacher_BTD.float()
    if directions:
        s_BTD, t_BTD = F.normalize(s_BTD, dim=-1), F.normalize(t_BTD, dim=-1)
    difference_BTD = s_BTD - t_BTD
    return (difference_BTD.abs() if power == 1 else difference_BTD.square()).mean()
