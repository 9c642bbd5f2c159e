"""Whether figures of methods differ by more than chance: paired t-test, one-way analysis of variance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Tested:
    """A statistic (t, F) and the chance of one as large where there is no difference."""

    statistic: float
    p: float


def paired_t_test(method: Sequence[float], baseline: Sequence[float]) -> Tested:
    """Student's t of the paired differences, two-sided.

    Differences that are all the same have no scatter: (0, 1) if they are zero, an infinite t otherwise. Fewer than two
    pairs give nan.
    """
    gap = np.asarray(method, float) - np.asarray(baseline, float)
    if len(gap) < 2:
        return Tested(math.nan, math.nan)
    if np.ptp(gap) == 0:
        return Tested(0.0, 1.0) if gap[0] == 0 else Tested(math.copysign(math.inf, gap[0]), 0.0)
    found = stats.ttest_rel(method, baseline)
    return Tested(float(found.statistic), float(found.pvalue))


def one_way_anova(groups: Sequence[Sequence[float]]) -> Tested:
    """F of the groups' means against the scatter within them; (0, 1) where all groups have the same mean.

    Fewer than two groups, or no group of more than one value, give nan.
    """
    values = [np.asarray(group, float) for group in groups if len(group)]
    if len(values) < 2 or max(map(len, values)) < 2:
        return Tested(math.nan, math.nan)
    if np.ptp([group.mean() for group in values]) == 0:
        return Tested(0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups without scatter: F is infinite, as it should be
        found = stats.f_oneway(*values)
    return Tested(float(found.statistic), float(found.pvalue))
