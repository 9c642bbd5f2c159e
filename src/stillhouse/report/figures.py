"""The report's figures: matplotlib draws them, CSS variables colour them, HTML carries legend and numbers.

Every colour is drawn as a placeholder that stands for a CSS variable, so one SVG suits both colour schemes.
Legends, titles and captions are left to the page, where they wrap, scale and are read aloud.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Formatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

PALETTE: dict[str, tuple[str, str]] = {  # CSS variable: (light, dark)
    "paper": ("#fbfaf7", "#17171a"),
    "ink": ("#1d1c1a", "#e7e4dd"),
    "quiet": ("#5d5a54", "#aaa59c"),
    "rule": ("#dcd8d0", "#36363c"),
    "wash": ("#f3f0ea", "#202024"),
    "accent": ("#8f4a16", "#e8a263"),
    "bad": ("#a3211b", "#ff8f80"),
    "badwash": ("#fbeae7", "#341d1b"),
    "grid": ("#e7e3db", "#2b2b31"),
    "axis": ("#8b867d", "#77736b"),
    "s1": ("#0f68a9", "#62b2f0"),
    "s2": ("#c4520a", "#f58a4c"),
    "s3": ("#0b7a5c", "#3cc79c"),
    "s4": ("#94408a", "#dd93cf"),
    "s5": ("#8a6d00", "#dcbb44"),
    "s6": ("#5b6f86", "#9fb0c3"),
}
SERIES_COLORS = ("s1", "s2", "s3", "s4", "s5", "s6")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (1.5, 1.8), (7, 2, 1.5, 2), (3, 1.5), (10, 3))
MAX_POINTS = 160  # the figures are about 320 px wide; what lies closer is noise, and drawn as a band
MAX_ROWS = 12

_PLACEHOLDER = {name: f"#fe00{index:02x}" for index, name in enumerate(PALETTE)}
_WIDTH, _HEIGHT = 4.4, 2.55  # inches of 72 units: about one unit per CSS pixel in a row of three
_SMALL = 10.0
_STEPS = (1, 2, 2.5, 5, 10)
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a name is a dollar
    "axes.unicode_minus": True,
    "lines.scale_dashes": False,
    "path.simplify": True,
    "axes.formatter.use_locale": False,
}


@dataclass(frozen=True)
class Series:
    """One line: values ``y`` at ``x``; non-finite values leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "ink"
    dash: tuple[float, ...] = ()
    width: float = 1.5

    @property
    def finite(self) -> list[float]:
        return [value for value in self.y if math.isfinite(value)]

    @property
    def constant(self) -> bool:
        """Whether every value is the same finite number."""
        return len(self.finite) == len(self.y) > 0 and min(self.y) == max(self.y)


@dataclass(frozen=True)
class Key:
    """A legend entry: the line's look, its name and its last finite value."""

    name: str
    color: str
    dash: str
    last: str


RELIABILITY_KEYS = [
    Key("accuracy", "s1", "", ""),
    Key("gap to confidence", "s2", "", ""),
    Key("perfect calibration", "axis", "4 3", ""),
    Key("number of predictions", "s6", "", ""),
]


@dataclass(frozen=True)
class Plot:
    """One figure for the page: the SVG, what stands around it, and the numbers behind it."""

    id: str
    title: str
    svg: str
    keys: list[Key] = field(default_factory=list)
    bucket: int = 1  # how many logged values one point of the longest line stands for
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def compact(value: float) -> str:
    """A number in at most about seven characters: ``0.4127``, ``1,204``, ``1.2e-05``, ``3.4M``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return re.sub(r"e-0", "e-", f"{value:.3g}").replace("-", "−")
    if size >= 1e15:
        return f"{value:.3g}".replace("e+", "e").replace("-", "−")
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}".replace("-", "−")
    if value == int(value) or size >= 1e4:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` evenly spaced indices below ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def shorten(name: str, most: int) -> str:
    """``name`` cut to ``most`` characters, the cut marked."""
    return name if len(name) <= most else name[: most - 1] + "…"


def line_plot(
    id: str,
    title: str,
    ylabel: str,
    series: Sequence[Series],
    *,
    unit_interval: bool = False,
    steep: bool = False,
    markers: bool = False,
) -> Plot | None:
    """Values over training steps.

    Long series are drawn as the mean of equal buckets with the bucket's range behind it. A ``steep``
    figure that is strictly positive and spans more than a factor of fifty gets a logarithmic axis.

    Returns:
        The figure, or None if no series holds a finite value.
    """
    drawn = [one for one in series if one.finite]
    if not drawn:
        return None
    every = [value for one in drawn for value in one.finite]
    low, high = min(every), max(every)
    log = steep and low > 0 and high / low > 50
    notes = []
    bucket = max(_bucket(len(one.y)) for one in drawn)
    for one in series:
        lost = [step for step, value in zip(one.x, one.y, strict=True) if not math.isfinite(value)]
        if lost:
            noun = "value" if len(lost) == 1 else "values"
            first = "at" if len(lost) == 1 else "first at"
            notes.append(f"{one.name}: {len(lost):,} non-finite {noun}, {first} step {compact(lost[0])}")

    with matplotlib.rc_context(_RC | {"svg.hashsalt": id}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT))
        axes = _axes(figure, (0.125, 0.175, 0.835, 0.695))
        for one in drawn:
            x, mean, least, most = _buckets(one)
            if len(x) < len(one.y):
                axes.fill_between(x, least, most, color=_PLACEHOLDER[one.color], alpha=0.18, linewidth=0)
            dots = markers or sum(map(math.isfinite, mean)) <= 30 or len(one.finite) == 1
            style = {"marker": "o", "markersize": 2.6, "markeredgewidth": 0} if dots else {}
            axes.plot(
                x,
                mean,
                color=_PLACEHOLDER[one.color],
                linewidth=one.width,
                linestyle=(0, one.dash) if one.dash else "-",
                **style,
            )
        if log:
            axes.set_yscale("log")
            decades = math.log10(high / low)
            subs: tuple[float, ...] = (1.0,) if decades > 2.5 else (1.0, 3.0)
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif unit_interval:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(_Ticks())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(_Ticks())
        axes.margins(x=0.015)
        _make_room(axes)
        _label(axes, "step", f"{ylabel} (log scale)" if log else ylabel)
        svg = _svg(figure, id, f"{title}: {ylabel} over training steps")

    steps = sorted({step for one in series for step in one.x})
    columns, rows = ["step", *(one.name for one in series)], []
    lookup = [dict(zip(one.x, one.y, strict=True)) for one in series]
    for index in evenly(len(steps), MAX_ROWS):
        step = steps[index]
        rows.append([compact(step), *(compact(values[step]) if step in values else "–" for values in lookup)])
    keys = [
        Key(one.name, one.color, " ".join(f"{length:g}" for length in one.dash), compact(one.finite[-1]))
        for one in drawn
    ]
    return Plot(id, title, svg, keys, bucket, notes, columns, rows)


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, the length in words, and whether it is drawn faintly."""

    label: str
    value: float
    shown: str
    faint: bool = False


def bar_plot(id: str, title: str, xlabel: str, bars: Sequence[Bar], *, most: int = 24) -> Plot | None:
    """Horizontal bars in the given order; of more than ``most`` only the longest are drawn."""
    usable = [bar for bar in bars if math.isfinite(bar.value) and bar.value >= 0]
    if not usable or max(bar.value for bar in usable) == 0:
        return None
    notes = []
    if len(usable) > most:
        floor = sorted((bar.value for bar in usable), reverse=True)[most - 1]
        notes.append(f"the longest {most} of {len(usable)}")
        usable = [bar for bar in usable if bar.value >= floor][:most]
    if any(bar.faint for bar in usable):
        notes.append("faint: taken from an earlier run")

    labels = [shorten(bar.label, 20) for bar in usable]
    left = min(max(len(label) for label in labels) * 5.7 + 8, 130) / (72 * _WIDTH)
    height = 0.25 * len(usable) + 0.65
    longest = max(bar.value for bar in usable)
    with matplotlib.rc_context(_RC | {"svg.hashsalt": id}):
        figure = Figure(figsize=(_WIDTH, height))
        axes = _axes(figure, (left, 0.52 / height, 0.8 - left, 1 - 0.57 / height))
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=_PLACEHOLDER["grid"], linewidth=0.7)
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_visible(True)
        axes.spines["left"].set_color(_PLACEHOLDER["axis"])
        for row, bar in enumerate(usable):
            axes.barh(row, bar.value, height=0.62, color=_PLACEHOLDER["accent"], alpha=0.35 if bar.faint else 0.9)
            axes.annotate(
                bar.shown,
                (bar.value, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=_SMALL,
                color=_PLACEHOLDER["ink"],
                annotation_clip=False,
            )
        axes.set_xlim(0, longest)
        axes.set_ylim(len(usable) - 0.4, -0.6)
        axes.yaxis.set_major_locator(FixedLocator(range(len(usable))))
        axes.set_yticklabels(labels)
        axes.tick_params(axis="y", labelcolor=_PLACEHOLDER["ink"])
        axes.tick_params(axis="x", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(_Ticks())
        _label(axes, xlabel, "")
        svg = _svg(figure, id, f"{title}, {xlabel}, one bar per stage")
    rows = [[bar.label, bar.shown] for bar in usable]
    return Plot(id, title, svg, notes=notes, columns=["stage", xlabel], rows=rows)


def reliability_plot(id: str, name: str, bins: Sequence[tuple[float, float, float]], ece: float) -> Plot | None:
    """Accuracy against confidence, bin by bin, over a histogram of the counts.

    Args:
        bins: (mean confidence, accuracy, count) of each bin; bins without a finite confidence are left out.
        ece: the expected calibration error, in the data's own units (0 to 1); NaN if unknown.
    """
    kept = sorted(one for one in bins if math.isfinite(one[0]) and one[2] != 0)
    points = [(confidence, accuracy) for confidence, accuracy, _ in kept if math.isfinite(accuracy)]
    if not points:
        return None
    confidences = [one[0] for one in kept]
    counts = [one[2] if math.isfinite(one[2]) else 0.0 for one in kept]
    gaps = [after - before for before, after in itertools.pairwise(confidences)]
    width = min(max(0.7 * min(gaps, default=0.07), 0.006), 0.07)
    with matplotlib.rc_context(_RC | {"svg.hashsalt": id}):
        figure = Figure(figsize=(_WIDTH, 4.1))
        left = (max(4, len(compact(max(counts)))) * 5.6 + 8) / (72 * _WIDTH)
        axes = _axes(figure, (left, 0.34, 0.96 - left, 0.585))
        axes.plot([0, 1], [0, 1], color=_PLACEHOLDER["axis"], linewidth=0.9, linestyle=(0, (4, 3)))
        for confidence, accuracy in points:
            axes.plot([confidence] * 2, [confidence, accuracy], color=_PLACEHOLDER["s2"], linewidth=3, alpha=0.45)
        axes.plot(
            *zip(*points, strict=True),
            color=_PLACEHOLDER["s1"],
            linewidth=1.3,
            marker="o",
            markersize=4,
            markeredgewidth=0,
        )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        quarters = FixedLocator([0, 0.25, 0.5, 0.75, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(quarters)
            axis.set_major_formatter(_Ticks())
        axes.set_xticklabels([])
        _label(axes, "", "accuracy (0 to 1)")
        below = _axes(figure, (left, 0.115, 0.96 - left, 0.135))
        below.bar(confidences, counts, width=width, color=_PLACEHOLDER["s6"])
        below.set_xlim(-0.02, 1.02)
        below.xaxis.set_major_locator(quarters)
        below.xaxis.set_major_formatter(_Ticks())
        below.yaxis.set_major_locator(MaxNLocator(2))
        below.yaxis.set_major_formatter(_Ticks())
        _label(below, "confidence (0 to 1)", "predictions (count)", rise=1.14)
        svg = _svg(figure, id, f"Reliability of {name}: accuracy against confidence, with counts")
    rows = [[compact(value) for value in kept[index]] for index in evenly(len(kept), 2 * MAX_ROWS)]
    title = f"{name}: ECE {ece:.3f}" if math.isfinite(ece) else name
    return Plot(id, title, svg, columns=["confidence", "accuracy", "predictions"], rows=rows)


class _Ticks(Formatter):
    """Tick labels with as many digits as tell neighbours apart, and never mathtext."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return compact(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        ordered = sorted(values)
        steps = [after - before for before, after in itertools.pairwise(ordered) if after > before]
        largest = max((abs(value) for value in values), default=0.0)
        if not steps or not 1e-3 <= largest < 1e5 or max(steps) > 1.5 * min(steps):
            return [compact(value) for value in values]
        step = steps[0]
        digits = next((d for d in range(9) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * 10**d * step), 9)
        return [f"{value:,.{digits}f}".replace("-", "−") for value in values]


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Any:
    figure.patch.set_visible(False)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_PLACEHOLDER["axis"])
    axes.set_axisbelow(True)
    axes.grid(True, axis="y", color=_PLACEHOLDER["grid"], linewidth=0.7)
    axes.tick_params(labelsize=_SMALL, labelcolor=_PLACEHOLDER["quiet"], color=_PLACEHOLDER["axis"], length=3)
    axes.tick_params(axis="y", length=0)
    return axes


def _make_room(axes: Any) -> None:
    """Move the left edge of the axes to where the tick labels end."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    longest = max((len(label) for label in axes.yaxis.get_major_formatter().format_ticks(ticks)), default=1)
    box, left = axes.get_position(), (longest * 5.6 + 8) / (72 * _WIDTH)
    axes.set_position((left, box.y0, box.x1 - left, box.height))


def _label(axes: Any, xlabel: str, ylabel: str, *, rise: float = 1.04) -> None:
    """Axis labels; the vertical one lies flat above its axis, where it is read without a tilted head."""
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=_SMALL, color=_PLACEHOLDER["quiet"], labelpad=2)
    if ylabel:
        left = -axes.get_position().x0 / axes.get_position().width
        color = _PLACEHOLDER["quiet"]
        axes.text(left, rise, ylabel, transform=axes.transAxes, fontsize=_SMALL, color=color, va="bottom")


def _bucket(count: int) -> int:
    return -(-count // MAX_POINTS)


def _buckets(one: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """Positions, means, minima and maxima of equal buckets; one without finite values is a gap."""
    size = _bucket(len(one.y))
    columns: list[tuple[float, float, float, float]] = []
    for start in range(0, len(one.y), size):
        values = [value for value in one.y[start : start + size] if math.isfinite(value)] or [math.nan]
        columns.append(
            (
                float(np.mean(one.x[start : start + size])),
                float(np.mean(values)),
                float(min(values)),
                float(max(values)),
            )
        )
    where, mean, least, most = (list(column) for column in zip(*columns, strict=True))
    return where, mean, least, most


def _svg(figure: Figure, id: str, label: str) -> str:
    """The figure as inline SVG: no prolog, metadata or global style, ids of its own, colours as variables."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has the fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head = re.search(r"<svg[^>]*viewBox=\"([^\"]+)\"[^>]*>", text)
    assert head is not None
    body = text[head.end() : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    used = set(re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", body))
    referenced = {name for pair in used for name in pair if name}
    body = re.sub(
        r" id=\"([^\"]*)\"",
        lambda match: f' id="{id}-{match[1]}"' if match[1] in referenced else "",
        body,
    )
    body = re.sub(r"url\(#", f"url(#{id}-", body)
    body = re.sub(r"xlink:href=\"#", f'href="#{id}-', body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r" d=\"([^\"]*)\"", _round_path, body)
    for name, color in _PLACEHOLDER.items():
        body = body.replace(color, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg class="plot" viewBox="{head[1]}" role="img" aria-label="{html.escape(label)}">{body}</svg>'


def _round_path(match: re.Match[str]) -> str:
    path = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", match[1])
    return f' d="{" ".join(path.split())}"'
