"""Pictures of samples, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sample_picture(samples: Mapping[str, Tensor], *, points: int = 2000, side: int = 8) -> str:
    """Samples side by side, one panel a model: points as dots, images as a ``side`` x ``side`` grid.

    Args:
        samples: name -> (N, 2, 1, 1) points, or (N, C, H, W) images in [-1, 1] with 1 or 3 channels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(samples), 2.9), layout="constrained")
    axes = figure.subplots(1, len(samples), squeeze=False)[0]
    for axis, (name, found) in zip(axes, samples.items(), strict=True):
        axis.set_title(name, fontsize=9)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        if found.shape[1:] == (2, 1, 1):
            x_N2 = found[:points].flatten(1).cpu().numpy()
            axis.scatter(x_N2[:, 0], x_N2[:, 1], s=1.5, linewidths=0, alpha=0.6, color="#2f5d8a", rasterized=True)
            axis.set_xlim(-2.6, 2.6)
            axis.set_ylim(-2.6, 2.6)
        else:
            axis.imshow(_tiled(found, side), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    return _svg(figure)


def _tiled(images: Tensor, side: int) -> Tensor:
    """The first images in a grid, in [0, 1], (H, W) or (H, W, 3)."""
    shown = ((images[: side * side].cpu().float() + 1) / 2).clamp(0, 1)
    count, channels, height, width = shown.shape
    if count < side * side:
        shown = torch.cat([shown, shown.new_zeros(side * side - count, channels, height, width)])
    grid = shown.reshape(side, side, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(side * height, side * width, channels).squeeze(-1)


def curves_picture(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines through (x, y) points, one a name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if log_x:
        axis.set_xscale("log")
    if log_y:
        axis.set_yscale("log")
    axis.legend(fontsize=7)
    return _svg(figure)


def points_picture(points: Mapping[str, tuple[float, float]], *, x: str, y: str) -> str:
    """Single points (x, y) with their names."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, at in points.items():
        axis.scatter(*at, s=18, color="#0f68a9")
        axis.annotate(name, at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.margins(0.12)
    return _svg(figure)


def matrix_picture(values: Sequence[Sequence[float | None]], *, rows: Sequence[str], columns: Sequence[str]) -> str:
    """A table as a heat map with its numbers; cells without one stay empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.2 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    axis.imshow(shown, cmap="viridis_r", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=6)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                axis.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=7, color="white")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "stillhouse", "savefig.dpi": 110}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
