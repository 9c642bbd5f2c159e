"""Choosing text by what a large model knows of it and a small one does not (Gu et al., 2025, arXiv 2410.17215).

All scores are (N), one a passage; passages with large scores are kept. Suffix: N passages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.base.errors import DataError


def difference_score(teacher_loss_N: Tensor, reference_loss_N: Tensor) -> Tensor:
    """log p(x) - log p_ref(x) per token, from the mean losses of the teacher and of the reference, in nats a token.

    Passages of one length are ranked as by the log-ratio of whole passages; with other lengths, long ones are not
    favoured.
    """
    return reference_loss_N.double() - teacher_loss_N.double()


def count_of(fraction: float, total: int) -> int:
    """floor(fraction * total), not thrown off by what a float cannot hold.

    Raises:
        DataError: nothing would be left.
    """
    count = math.floor(fraction * total + 1e-9)
    if count < 1:
        raise DataError(f"alpha={fraction:g} of {total} passages keeps none; keep a larger share")
    return count


def top_fraction(score_N: Tensor, fraction: float) -> Tensor:
    """Positions of the floor(fraction N) largest scores, ascending; of equal scores the first ones are kept."""
    order_N = score_N.double().argsort(descending=True, stable=True)
    return order_N[: count_of(fraction, len(score_N))].sort().values


def gumbel_top_fraction(score_N: Tensor, fraction: float, *, temperature: float, seed: int) -> Tensor:
    """As many positions, drawn without replacement with probability proportional to exp(score / temperature).

    Gumbel noise on the scores and the largest of the sums (Kool et al., 2019, arXiv 1903.06059).
    """
    uniform_N = torch.rand(len(score_N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gumbel_N = -torch.log(-torch.log(uniform_N.clamp(1e-300, 1 - 1e-16)))
    return top_fraction(score_N.double() / temperature + gumbel_N, fraction)
