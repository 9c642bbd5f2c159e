"""Pictures of what was kept of a corpus, and of how a mixture of domains changed, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0f68a9", "#c4520a", "#0b7a5c", "#94408a", "#8a6d00", "#5b6f86", "#b02a4c", "#3c8f8f")


def score_picture(scores: Mapping[str, Sequence[float]], threshold: float | None, *, x: str, bins: int = 60) -> str:
    """How many passages of each group have which score, stacked; ``threshold``: what is right of it is kept."""
    from matplotlib.figure import Figure

    everything = np.concatenate([np.asarray(one, float) for one in scores.values()])
    low, high = np.quantile(everything, [0.002, 0.998])
    edges = np.linspace(low, max(high, low + 1e-6), bins + 1)
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.hist(
        [np.clip(np.asarray(one, float), low, high) for one in scores.values()],
        bins=list(edges),
        stacked=True,
        label=[f"{name} ({len(one):,})" for name, one in scores.items()],
        color=[COLOURS[number % len(COLOURS)] for number in range(len(scores))],
    )
    if threshold is not None:
        axis.axvline(threshold, color="#1f2933", linewidth=1, linestyle="--", label="smallest score kept")
    axis.set_xlabel(x)
    axis.set_ylabel("passages")
    axis.legend(fontsize=7)
    return _svg(figure)


def course_picture(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, steps: bool) -> str:
    """Lines through (x, y) points, one a name; ``steps``: values that hold until the next point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        axis.plot(
            *zip(*points, strict=True),
            drawstyle="steps-post" if steps else "default",
            linewidth=1.4,
            label=name,
            color=COLOURS[number % len(COLOURS)],
        )
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "stillhouse"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
