"""How good ranked results are, and whether one way of searching is better than another.

Grades are those of the results in the order shown: 0 of no use, above 0 relevant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


def reciprocal_rank(grades: Sequence[float]) -> float:
    """1 / rank of the first relevant result; 0 if there is none. Its mean over queries is the MRR."""
    return next((1 / rank for rank, grade in enumerate(grades, start=1) if grade > 0), 0.0)


def precision_at(grades: Sequence[float], k: int) -> float:
    """Share of relevant ones among the first ``k`` results; places that stay empty are not relevant."""
    return sum(grade > 0 for grade in grades[:k]) / k


def recall_at(grades: Sequence[float], k: int, relevant: int) -> float:
    """Share of all ``relevant`` documents that are among the first ``k`` results."""
    return sum(grade > 0 for grade in grades[:k]) / relevant if relevant else math.nan


def ndcg_at(grades: Sequence[float], k: int, ideal: Sequence[float]) -> float:
    """Discounted gain (2^grade - 1) / log2(rank + 1) over the best possible (Burges et al., 2005).

    Args:
        ideal: the grades of all relevant documents.
    """

    def gain(row: Sequence[float]) -> float:
        return sum((2**grade - 1) / math.log2(rank + 1) for rank, grade in enumerate(row[:k], start=1))

    best = gain(sorted(ideal, reverse=True))
    return gain(grades) / best if best else math.nan


def consensus(grades: Sequence[int]) -> int:
    """One grade from several graders': what more than half of them say, else the median (the lower of two)."""
    grade, votes = Counter(grades).most_common(1)[0]
    return grade if 2 * votes > len(grades) else sorted(grades)[(len(grades) - 1) // 2]


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: mean difference, t-test's p, Cohen's d of the differences, and the corrected verdict."""

    difference: float
    p: float
    d: float
    threshold: float

    @property
    def significant(self) -> bool:
        return self.p < self.threshold


def compare_paired(
    method: Sequence[float], baseline: Sequence[float], *, comparisons: int = 1, level: float = 0.05
) -> Comparison:
    """Paired t-test of figures by query, significant below ``level / comparisons`` (Bonferroni).

    Cohen's d is the mean difference over the standard deviation of the differences. Differences that are all zero
    have p = 1 and d = 0.
    """
    differences = np.asarray(method, float) - np.asarray(baseline, float)
    threshold = level / comparisons
    if not differences.any():
        return Comparison(0.0, 1.0, 0.0, threshold)
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    if spread == 0:
        return Comparison(mean, 0.0, math.copysign(math.inf, mean), threshold)
    return Comparison(mean, float(stats.ttest_rel(method, baseline).pvalue), mean / spread, threshold)


def vocabulary_survival(
    verbatim: Sequence[str], distilled: Sequence[str], idf: Mapping[str, float], *, count: int = 15
) -> float:
    """Share of the ``count`` rarest words of a text that its distilled form still holds."""
    rarest = sorted(set(verbatim), key=lambda word: (-idf.get(word, 0.0), word))[:count]
    kept = set(distilled)
    return sum(word in kept for word in rarest) / len(rarest) if rarest else math.nan


@dataclass(frozen=True)
class Compression:
    """Tokens before and after. The ratio of the means, and the mean and median of the ratios, differ widely."""

    before: float
    after: float
    ratio_of_means: float
    mean_ratio: float
    median_ratio: float


def compression(before: Sequence[int], after: Sequence[int]) -> Compression:
    """Figures of so many texts; counts by text."""
    ratios = np.asarray(before, float) / np.maximum(np.asarray(after, float), 1)
    first, then = float(np.mean(before)), float(np.mean(after))
    return Compression(first, then, first / max(then, 1e-12), float(ratios.mean()), float(np.median(ratios)))
