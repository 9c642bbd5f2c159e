"""Teacher hacking: whether a student that comes ever closer to its teacher moves away from the truth.

The analogue of reward hacking (Tiapkin et al., 2025, arXiv 2502.02671): the proxy, a distance to the teacher, falls
while the golden distance, to what the teacher was meant to stand for, rises. Without the truth what is left to see is
that the proxy no longer falls by the power law it began with, and that the training loss lies below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.base.files import read_json
from stillhouse.base.table import Column, Table

Points = Sequence[tuple[float, float]]
"""(step, value), in the order of the steps."""

PROXIES = ("proxy", "teacher_kl", "selection_loss")
TERMS = {"selection_loss": "CrossEntropy"}  # of the training loss, by proxy; of the others it is ForwardKL
FLAT = 0.02  # a proxy that rises by no more than this share of itself stagnates


@dataclass(frozen=True)
class PowerLaw:
    """value = scale * step^slope."""

    scale: float
    slope: float

    def at(self, step: float) -> float:
        return self.scale * step**self.slope


@dataclass(frozen=True)
class Departure:
    """How a curve follows the law of its beginning.

    Attributes:
        law: fitted to the first ``window`` points.
        residuals: log(value / law) at every point.
        flagged: the first step from which on the residual exceeds the tolerance up to the end, or None.
    """

    law: PowerLaw
    window: int
    residuals: tuple[float, ...]
    flagged: float | None


def fit_power_law(points: Points) -> PowerLaw:
    """Least squares in both logarithms; ``ValueError`` unless two points or more have positive steps and values."""
    kept = [(x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(y)]
    if len({x for x, _ in kept}) < 2:
        raise ValueError("a power law needs two points with positive steps and values")
    steps, values = np.log(np.array(kept)).T
    slope, intercept = np.polyfit(steps, values, 1)
    return PowerLaw(float(np.exp(intercept)), float(slope))


def departure(points: Points, *, window: float = 0.4, tolerance: float = 0.1) -> Departure | None:
    """Fit the law to the first ``window`` of the points, and look where the rest leave it upwards.

    Args:
        window: share of the points, four of them at least.
        tolerance: in logarithms: 0.1 is about a tenth above the law.

    Returns:
        None where there are fewer than six points, of which two at least are after the window.
    """
    kept = [(x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(y)]
    count = max(4, round(window * len(kept)))
    if len(kept) < max(6, count + 2):
        return None
    law = fit_power_law(kept[:count])
    residuals = tuple(math.log(y / law.at(x)) for x, y in kept)
    late = len(kept)
    while late > count and residuals[late - 1] > tolerance:
        late -= 1
    return Departure(law, count, residuals, kept[late][0] if late < len(kept) else None)


@dataclass(frozen=True)
class Hacking:
    """What the golden curve says, which only an oracle can draw.

    Attributes:
        best: step at which the golden distance is least.
        rise: by what share of the least it is higher at the end.
        proxy_change: by what share the proxy changes from there to the end.
        hacked: the golden distance rises by more than the tolerance while the proxy falls or stagnates.
    """

    best: float
    rise: float
    proxy_change: float
    hacked: bool


def hacking(proxy: Points, golden: Points, *, tolerance: float = 0.02) -> Hacking:
    """Compare two curves of the same steps, from the golden one's minimum on."""
    steps, values = zip(*golden, strict=True)
    near = dict(proxy)
    at = min(range(len(values)), key=lambda place: values[place])
    rise = values[-1] / values[at] - 1 if values[at] > 0 else 0.0
    before, after = near[steps[at]], near[steps[-1]]
    change = after / before - 1 if before > 0 else 0.0
    return Hacking(steps[at], rise, change, rise > tolerance and change <= FLAT)


def fell_below(train: Points, proxy: Points) -> float | None:
    """The first step from which on the training loss stays below the validation proxy; None if it does not.

    Both in nats a token. The training loss of a step is the mean of what was logged since the proxy was last measured.
    """
    found, last = None, 0.0
    for step, value in proxy:
        between = [y for x, y in train if last < x <= step]
        last = step
        if not between:
            continue
        if np.mean(between) < value:
            found = step if found is None else found
        else:
            found = None
    return found


# -- any run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What a training stage's ``metrics.jsonl`` says: named figures by step, and the loss terms of its player.

    ``config``: the field values of its run, as far as they are known.
    """

    stage: str
    figures: Mapping[str, Points]
    terms: Mapping[str, Points]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def proxy(self) -> str | None:
        """The figure that is nearest to a distance to the teacher."""
        return next((name for name in PROXIES if len(self.figures.get(name, ())) > 1), None)

    @property
    def comparable(self) -> Points:
        """The training loss where it is what the proxy is, on other text of the same kind; nothing elsewhere."""
        return () if self.obstacle else self.terms[TERMS.get(self.proxy or "", "ForwardKL")]

    @property
    def obstacle(self) -> str | None:
        """Why the training loss must not be compared with the proxy, if so."""
        term, config = TERMS.get(self.proxy or "", "ForwardKL"), self.config
        # A cross-entropy is on the data's text, but for systems that learn the labels of whatever text there is.
        other = term != "CrossEntropy" or config.get("divergence") == "labels"
        drawn = [config.get(name, 1) for name in ("sampling_temperature", "top_p", "beams")]
        temperature = config.get("temperature", 1)
        if not self.terms.get(term):
            return f"it has no term {term}"
        if other and config.get("on_policy"):
            return "some of its text the student wrote"
        if other and self.proxy != "proxy" and config.get("text") == "teacher":
            return "some of its text the teacher wrote"
        if self.proxy == "proxy" and drawn != [1, 1, 1]:
            return "its text was not drawn as the responses are that the proxy is measured on"
        if term == "ForwardKL" and temperature != 1:
            return f"its KL is of distributions at temperature {temperature:g}, times the square of that"
        return None

    @property
    def watched(self) -> Points:
        """The proxy in nats a token."""
        return self.figures.get("proxy_per_token", self.figures.get(self.proxy or "", ()))


def read_course(stage: str, metrics: Path) -> Course | None:
    """The course of a stage that evaluated while it trained, finished or not; None if it did not.

    What its run was configured with is read from ``stage.json`` beside it.
    """
    figures: dict[str, dict[float, float]] = {}
    terms: dict[str, dict[float, float]] = {}
    for line in _lines(metrics):
        step = line.get("step")
        if not isinstance(step, int | float):
            continue
        if line.get("kind") == "eval":
            for name, value in line["metrics"].items():
                figures.setdefault(name, {})[step] = value  # a resumed run logs steps twice: the later one counts
        elif line.get("kind") == "train":
            for name, term in line.get("terms", {}).items():
                terms.setdefault(name, {})[step] = term["value"]
    if not figures:
        return None
    sort = {name: sorted(values.items()) for name, values in figures.items()}
    record = metrics.with_name("stage.json")
    plan = (read_json(record).get("plan") or {}) if record.exists() else {}
    return Course(stage, sort, {name: sorted(values.items()) for name, values in terms.items()}, plan.get("config", {}))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut short by a kill
            continue


COLUMNS = [
    Column("proxy", "proxy at the end", ".4f", "lower", "distance to the teacher; see the notes for which"),
    Column("slope", "slope", ".2f", None, "of the proxy's power law over the early window"),
    Column("residual", "above the law", ".1%", "lower", "the proxy at the end against what the law foretold"),
    Column("flagged", "flagged from step", ",.0f", None, "from there on the proxy stays above its law"),
    Column("overfit", "loss below proxy from", ",.0f", None, "from this step on the training loss is below the proxy"),
    Column("golden", "golden at the end", ".4f", "lower", "distance to the oracle"),
    Column("golden_rise", "golden rise", ".1%", "lower", "from its least value, while the proxy went on to fall"),
    Column("best_step", "golden best at", ",.0f", None, "the step with the least golden distance"),
]
MEANING = {
    "proxy": "KL(teacher || student) of whole responses, nats",
    "teacher_kl": "KL(teacher || student) on the selection text, nats a token",
    "selection_loss": "cross-entropy on the selection text, nats a token: a stand-in, with a floor that is not zero",
}


def hacking_table(courses: Sequence[Course], *, window: float = 0.4, tolerance: float = 0.1) -> Table:
    """What the curves of training stages say: one row a stage, with the golden curve where there is one.

    Figures that are not known are left out of a row.
    """
    rows: list[dict[str, Any]] = []
    notes = []
    for course in courses:
        name = course.proxy
        if name is None:
            continue
        curve = course.figures[name]
        row: dict[str, Any] = {"name": course.stage, "proxy": curve[-1][1]}
        found = departure(curve, window=window, tolerance=tolerance)
        if found is not None:
            row |= {"slope": found.law.slope, "residual": math.expm1(found.residuals[-1]), "flagged": found.flagged}
            if found.flagged is not None:
                notes.append(f"{course.stage}: the proxy leaves its power law at step {found.flagged:,.0f}.")
        else:
            notes.append(f"{course.stage}: {len(curve)} evaluations are too few for a law; evaluate more often.")
        if course.obstacle is None:
            row["overfit"] = fell_below(course.comparable, course.watched)
        else:
            notes.append(f"{course.stage}: the training loss is not compared with the proxy: {course.obstacle}.")
        if "golden" in course.figures:
            golden = hacking(curve, course.figures["golden"])
            row |= {"golden": course.figures["golden"][-1][1], "best_step": golden.best, "golden_rise": golden.rise}
            row["hacked"] = float(golden.hacked)
            if golden.hacked:
                notes.append(
                    f"{course.stage}: teacher hacking: from step {golden.best:,.0f} on the golden distance rose by "
                    f"{golden.rise:.1%} while the proxy changed by {golden.proxy_change:+.1%}."
                )
        rows.append(row)
        notes.append(f"{course.stage}: the proxy is {MEANING[name]}.")
    shown = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return Table("Teacher hacking", shown, rows, list(dict.fromkeys(notes)))


def figures_of(table: Table) -> dict[str, float]:
    """The table's numbers by ``row/column``: what a stage keeps as its results."""
    return {
        f"{row['name']}/{key}": float(value)
        for row in table.rows
        for key, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
