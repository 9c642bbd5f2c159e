"""Draws the samples that the pages of the tasks show: ``python docs/_pictures.py``."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import networkx
import torch
from matplotlib.figure import Figure

from stillhouse.data.densities import density
from stillhouse.data.glyphs import glyphs
from stillhouse.data.graphs import GraphData, molecules
from stillhouse.data.shapes import Shapes
from stillhouse.tasks.pictures import sample_picture
from stillhouse.tasks.segmentation_pictures import draw_masks
from stillhouse.tasks.vision import sample_picture as digits_picture

TASKS = Path(__file__).parent / "tasks"
COLOURS = ("#5b6f86", "#c4520a", "#0f68a9", "#0b7a5c", "#94408a", "#8a6d00")


def densities() -> str:
    names = ("eight-gaussians", "moons", "spirals", "checkerboard")
    drawn = {name: density(name).draw(2000, torch.Generator().manual_seed(0))[0] for name in names}
    return sample_picture({name: points[:, :, None, None] for name, points in drawn.items()})


def shapes() -> str:
    items = [Shapes(count=3, seed=0)[number] for number in range(3)]
    return draw_masks([(item["image"], item["masks"], item["points"]) for item in items], {})


def graphs(data: GraphData, each: int = 3) -> str:
    figure = Figure(figsize=(2.2 * each, 2.2 * data.classes), layout="constrained")
    axes = figure.subplots(data.classes, each, squeeze=False)
    for label, row in enumerate(axes):
        chosen = [graph for graph in data.graphs if graph.label == label][:each]
        for axis, graph in zip(row, chosen, strict=True):
            drawn = networkx.Graph(graph.edges.T.tolist())
            drawn.add_nodes_from(range(len(graph.nodes)))
            colours = [COLOURS[int(graph.nodes[node]) % len(COLOURS)] for node in drawn]
            places = networkx.kamada_kawai_layout(drawn)
            networkx.draw(drawn, places, ax=axis, node_size=30, node_color=colours, edge_color="#9aa4b0")
        row[0].set_title(f"class {label}", loc="left", fontsize=9)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main() -> None:
    digits_picture(TASKS / "digits.svg")
    drawn = {
        "densities": densities(),
        "glyphs": sample_picture({"glyphs": glyphs("train", count=64).pixels}),
        "shapes": shapes(),
        "graphs": graphs(molecules(40, seed=0)),
    }
    for name, svg in drawn.items():
        (TASKS / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
