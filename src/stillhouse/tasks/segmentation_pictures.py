"""Pictures of masks, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = ("#c4520a", "#0f68a9", "#0b7a5c", "#94408a", "#8a6d00", "#5b6f86")


def draw_masks(
    pictures: Sequence[tuple[Tensor, Tensor, Tensor]], drawn: Mapping[str, Sequence[Tensor]], *, inches: float = 1.4
) -> str:
    """An SVG with a row for the truth and one for each model: images with the outlines of masks and the points asked.

    Args:
        pictures: (image (3, S, S), masks (K, S, S), points (K, 2)); images of any range are stretched to fit.
        drawn: model name -> its masks (K, S, S) of every picture.
    """
    rows = {"truth": [masks for _, masks, _ in pictures], **drawn}
    figure = Figure(figsize=(inches * len(pictures) + 0.3, inches * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(pictures), squeeze=False)
    for line, (name, found) in zip(axes, rows.items(), strict=True):
        for axis, (image, _, points), masks in zip(line, pictures, found, strict=True):
            low, high = image.min(), image.max()
            axis.imshow(
                ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy(), interpolation="nearest"
            )
            for mask, point, colour in zip(masks, points.tolist(), COLOURS * len(masks), strict=False):
                if mask.any() and not mask.all():
                    axis.contour(mask.float().numpy(), levels=[0.5], colors=[colour], linewidths=1.4)
                axis.plot(*point, marker="o", markersize=3.5, color=colour, markeredgecolor="white")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
