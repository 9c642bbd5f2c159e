"""Losses: pure functions of tensors, each with its source."""

from stillhouse.losses.divergences import (
    AlphaBeta,
    ForwardKL,
    InterpolatedForwardKL,
    JensenShannon,
    ReverseKL,
    RowDivergence,
    SkewedForwardKL,
    SkewedReverseKL,
    ToDi,
    TotalVariation,
    align_vocabulary,
    reduce,
    value_and_grad,
)
from stillhouse.losses.linear_divergence import LinearDivergence, linear_cross_entropy, linear_divergence

__all__ = [
    "AlphaBeta",
    "ForwardKL",
    "InterpolatedForwardKL",
    "JensenShannon",
    "LinearDivergence",
    "ReverseKL",
    "RowDivergence",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "ToDi",
    "TotalVariation",
    "align_vocabulary",
    "linear_cross_entropy",
    "linear_divergence",
    "reduce",
    "value_and_grad",
]
