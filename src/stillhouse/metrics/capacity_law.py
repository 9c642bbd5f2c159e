"""The law of the capacity gap: the best teacher's size grows in proportion to the student's.

Zhang et al. (ACL 2025, arXiv 2311.07052): N_T* = k N_S, k about 2.5, over GPT-2 and Pythia. Suffix: S students.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from stillhouse.base.errors import DataError

PUBLISHED_K = 2.5


@dataclass(frozen=True)
class BestTeacher:
    """The size of teacher that makes the best student of ``student`` parameters.

    ``at_edge``: it is the smallest or largest that was tried, so the true one may lie outside the grid.
    """

    student: float
    teacher: float
    at_edge: bool


@dataclass(frozen=True)
class CapacityLaw:
    """N_T* = k N_S, and how it was found; intervals are at 95 %, None where two points cannot give one.

    Attributes:
        k: through the origin, least squares.
        slope: of log N_T* against log N_S; 1 if the law is one of proportion. None for one student.
    """

    k: float
    interval: tuple[float, float] | None
    slope: float | None
    slope_interval: tuple[float, float] | None
    points: tuple[BestTeacher, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def best_teacher(teachers: Sequence[float], scores: Sequence[float], student: float) -> BestTeacher:
    """The maximum of a row of scores (more is better) over teachers' sizes.

    Inside the grid: of the parabola in log size through the best and its two neighbours. Scores of nan are left out.
    """
    known = sorted((size, score) for size, score in zip(teachers, scores, strict=True) if not math.isnan(score))
    if not known:
        raise DataError(f"no teacher was tried for the student of {student:,.0f} parameters; give larger teachers")
    at = max(range(len(known)), key=lambda place: known[place][1])
    if at in (0, len(known) - 1):
        return BestTeacher(student, known[at][0], True)
    near = known[at - 1 : at + 2]
    origin = math.log(known[at][0])
    a, b, _ = np.polyfit([math.log(size) - origin for size, _ in near], [score for _, score in near], 2)
    return BestTeacher(student, math.exp(origin - b / (2 * a)) if a < 0 else known[at][0], False)


def fit_law(points: Sequence[BestTeacher]) -> CapacityLaw:
    """k by least squares through the origin, k = sum N_T N_S / sum N_S^2, and the slope in logarithms."""
    if not points:
        raise DataError("the law needs at least one student with its best teacher")
    student_S = np.array([point.student for point in points])
    teacher_S = np.array([point.teacher for point in points])
    k = float((teacher_S * student_S).sum() / (student_S**2).sum())
    interval = slope = slope_interval = None
    if len(points) > 2:
        # The ratio's scatter is multiplicative: its interval comes from the logarithms of N_T / N_S.
        ratio_S = np.log(teacher_S / student_S)
        half = stats.t.ppf(0.975, len(points) - 1) * stats.sem(ratio_S)
        interval = (k * math.exp(-half), k * math.exp(half))
    if len(set(student_S.tolist())) > 1:
        line = stats.linregress(np.log(student_S), np.log(teacher_S))
        slope = float(line.slope)
        if len(points) > 2:
            half = stats.t.ppf(0.975, len(points) - 2) * line.stderr
            slope_interval = (slope - half, slope + half)
    return CapacityLaw(k, interval, slope, slope_interval, tuple(points))


def recommend_teacher(student: float, zoo: Mapping[str, float], *, k: float = PUBLISHED_K) -> str:
    """The model of ``zoo`` (name -> parameters) whose size is nearest to k N_S in logarithm."""
    if not zoo:
        raise DataError("no teacher to choose from")
    return min(zoo, key=lambda name: abs(math.log(zoo[name] / (k * student))))
