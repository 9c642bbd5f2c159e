"""Pictures of condensed graphs, as SVG text."""

from __future__ import annotations

import io
from collections import defaultdict

from stillhouse.data.graphs import Graph, GraphData

COLOURS = ("#5b6f86", "#c4520a", "#0f68a9", "#0b7a5c", "#94408a", "#8a6d00")


def draw_trees(data: GraphData, *, each: int = 2, most: int = 8, inches: float = 1.6) -> str:
    """The most frequent condensed graphs of every class, a row each: trees from the root down, coloured by label.

    Args:
        each: graphs of a class.
        most: trees of a graph that are drawn.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    chosen = []
    for label in range(data.classes):
        own = sorted((g for g in data.graphs if g.label == label), key=lambda g: -g.frequency)
        chosen += own[:each]
    figure = Figure(figsize=(9, inches * len(chosen)), layout="constrained")
    drawn = [_places(graph, most) for graph in chosen]
    widest = max(x for places in drawn for x, _ in places.values())
    axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axis, graph, places in zip(axes, chosen, drawn, strict=True):
        axis.set_xlim(-1, widest + 1)
        for child, parent in graph.edges.T.tolist():
            if child in places and parent in places:
                (x0, y0), (x1, y1) = places[child], places[parent]
                axis.plot([x0, x1], [y0, y1], color="#9aa4b0", linewidth=0.8, zorder=1)
        for node, (x, y) in places.items():
            label = int(graph.nodes[node])
            axis.scatter(x, y, s=26, color=COLOURS[label % len(COLOURS)], zorder=2)
        axis.set_axis_off()
        axis.set_title(
            f"class {graph.label}, in {graph.frequency:.0f} graphs: {int(graph.roots.sum())} trees",
            fontsize=8,
            loc="left",
        )
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "stillhouse"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _places(graph: Graph, most: int) -> dict[int, tuple[float, float]]:
    """Where the nodes of the first trees are drawn: leaves side by side, parents above the middle of their children."""
    below: dict[int, list[int]] = defaultdict(list)
    for child, parent in graph.edges.T.tolist():
        below[parent].append(child)
    places: dict[int, tuple[float, float]] = {}
    free = 0.0

    def place(node: int, depth: int) -> float:
        nonlocal free
        if below[node]:
            own = [place(child, depth + 1) for child in below[node]]
            x = (own[0] + own[-1]) / 2
        else:
            x, free = free, free + 1
        places[node] = (x, -depth)
        return x

    for root in graph.roots.nonzero().flatten().tolist()[:most]:
        place(root, 0)
        free += 1.5
    return places
