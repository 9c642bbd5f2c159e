"""Pictures of samples, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor


def sample_picture(samples: Mapping[str, Tensor], *, points: int = 2000, side: int = 8) -> str:
    """Samples side by side, one panel a model: points as dots, images as a ``side`` x ``side`` grid.

    Args:
        samples: name -> (N, 2, 1, 1) points, or (N, C, H, W) images in [-1, 1] with 1 or 3 channels.
    """
    from matplotlib import rc_context
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
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "stillhouse", "savefig.dpi": 110}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _tiled(images: Tensor, side: int) -> Tensor:
    """The first images in a grid, in [0, 1], (H, W) or (H, W, 3)."""
    shown = ((images[: side * side].cpu().float() + 1) / 2).clamp(0, 1)
    count, channels, height, width = shown.shape
    if count < side * side:
        shown = torch.cat([shown, shown.new_zeros(side * side - count, channels, height, width)])
    grid = shown.reshape(side, side, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(side * height, side * width, channels).squeeze(-1)
