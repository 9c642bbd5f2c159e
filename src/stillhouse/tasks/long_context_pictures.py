"""Pictures of generated long documents, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping

from stillhouse.tasks.long_context import Document

COLOURS = {"O": "#eef1f4", "HEAD": "#f0c987", "PER": "#9ecae1", "LOC": "#a1d99b", "ORG": "#dab6e6", "ANS": "#fb9a99"}


def documents_picture(documents: Mapping[str, Document], *, columns: int = 12) -> str:
    """Documents word by word: entities in the colour of their type, the head of the document in its own."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [-(-len(document.words) // columns) for document in documents.values()]
    figure = Figure(figsize=(9, 0.27 * sum(rows) + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, height, (name, document) in zip(axes, rows, documents.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, columns)
        axis.set_ylim(height, 0)
        axis.axis("off")
        head = 0 if name == "short-ner" else document.head
        for place, (word, tag) in enumerate(zip(document.words, document.tags, strict=True)):
            x, y = place % columns, place // columns
            kind = "HEAD" if place < head else tag[2:] or "O"
            axis.add_patch(matplotlib.patches.Rectangle((x + 0.02, y + 0.08), 0.96, 0.84, color=COLOURS[kind]))
            label = word if tag == "O" else f"{word} {tag}"
            axis.text(x + 0.5, y + 0.5, label, ha="center", va="center", fontsize=5.5 if tag != "O" else 6.5)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stillhouse"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
