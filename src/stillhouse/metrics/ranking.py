"""How well scores put positives before negatives, and whether two scores put things in one order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from torch import Tensor


def roc_auc(scores_N: Tensor, positive_N: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    From the rank sum (Mann and Whitney, 1947); nan if one of the two kinds is missing.
    """
    wanted = positive_N.bool().numpy()
    positives, negatives = int(wanted.sum()), int((~wanted).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = stats.rankdata(scores_N.double().numpy())
    return float((ranks[wanted].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def macro_roc_auc(probabilities_NV: Tensor, labels_N: Tensor) -> float:
    """Mean over classes of one-against-the-rest `roc_auc`; with two classes, that of the second."""
    classes = probabilities_NV.shape[1]
    if classes == 2:
        return roc_auc(probabilities_NV[:, 1], labels_N == 1)
    return float(np.nanmean([roc_auc(probabilities_NV[:, c], labels_N == c) for c in range(classes)]))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Spearman's rho and Kendall's tau-b of paired scores, ties shared; nan where one of them never changes."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return {"spearman": float("nan"), "kendall": float("nan")}
    return {
        "spearman": float(stats.spearmanr(one, other).statistic),
        "kendall": float(stats.kendalltau(one, other).statistic),
    }
