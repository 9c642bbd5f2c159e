"""Labelled graphs: molecule-like ones made by code, and the user's own data sets.

`GraphData` holds graphs with discrete node and edge labels. A record of a file or hub data set has the columns of the
TU and OGB sets on the hub: ``edge_index`` ([[sources], [targets]]), ``node_feat`` (a list of whole numbers per node; a
node's label is the whole list), ``edge_attr`` (optional, likewise per edge), ``y`` (a class). Condensed sets add
``roots``, ``degrees`` and ``frequency``, and are read by the same loader.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.errors import DataError, near, one_line, suggest

EMBEDDED_TRAIN, EMBEDDED_TEST = 400, 300


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph of N nodes and E directed edges; an undirected edge is two of them.

    Attributes:
        nodes: labels (N,) int64.
        edges: (2, E) int64, sources above targets: messages flow from source to target.
        edge_labels: (E,) int64.
        label: the class.
        degrees: (N,) int64, edges into each node; a condensed graph keeps those of the original.
        roots: (N,) bool: the nodes that are pooled; all, in an intact graph.
        frequency: how often the graph counts.
    """

    nodes: Tensor
    edges: Tensor
    edge_labels: Tensor
    label: int
    degrees: Tensor = field(default=None)  # type: ignore[assignment]
    roots: Tensor = field(default=None)  # type: ignore[assignment]
    frequency: float = 1.0

    def __post_init__(self) -> None:
        if self.degrees is None:
            object.__setattr__(self, "degrees", torch.bincount(self.edges[1], minlength=len(self)))
        if self.roots is None:
            object.__setattr__(self, "roots", torch.ones(len(self), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.nodes)

    def bytes(self) -> int:
        """Size when stored compactly: 1 byte a node label and an edge label, 2 x 2 an edge, 1 the class, 4 a count.

        The count is that of condensed graphs only; whole graphs have none.
        """
        condensed = not bool(self.roots.all())
        return len(self) + 5 * self.edges.shape[1] + 1 + 4 * condensed


@dataclass(frozen=True)
class GraphData:
    """Graphs for classification, and how many node labels, edge labels and classes there are."""

    graphs: tuple[Graph, ...]
    node_labels: int
    edge_labels: int
    classes: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, position: int) -> Graph:
        return self.graphs[position]

    def sizes(self, whole: GraphData) -> dict[str, float]:
        """Graphs, bytes, and how many times smaller these are than ``whole``."""
        return {"graphs": len(self), "bytes": self.bytes(), "smaller": whole.bytes() / self.bytes()}

    def class_sizes(self) -> list[int]:
        """How many graphs there are of each class. Raises `DataError` where one has none."""
        sizes = [sum(graph.label == label for graph in self.graphs) for label in range(self.classes)]
        if 0 in sizes:
            raise DataError(f"{self.name}: no training graph of class {sizes.index(0)}; divide the data otherwise")
        return sizes

    def take(self, positions: Iterable[int]) -> GraphData:
        """Some of the graphs."""
        return replace(self, graphs=tuple(self.graphs[position] for position in positions))

    def bytes(self) -> int:
        """Size when stored compactly; see `Graph.bytes`."""
        return sum(graph.bytes() for graph in self.graphs)


def collate_graphs(graphs: Sequence[Graph]) -> dict[str, Tensor]:
    """One batch: the disjoint union of B graphs of N nodes in all.

    ``nodes`` (N,), ``edges`` (2, E), ``edge_labels`` (E,), ``degrees`` (N,), ``roots`` (N,), ``graph`` (N,): which
    graph a node is of; ``labels`` (B,).
    """
    sizes = torch.tensor([len(graph) for graph in graphs])
    starts = sizes.cumsum(0) - sizes
    return {
        "nodes": torch.cat([graph.nodes for graph in graphs]),
        "edges": torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=True)], dim=1),
        "edge_labels": torch.cat([graph.edge_labels for graph in graphs]),
        "degrees": torch.cat([graph.degrees for graph in graphs]),
        "roots": torch.cat([graph.roots for graph in graphs]),
        "graph": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        "labels": torch.tensor([graph.label for graph in graphs]),
    }


def graph_from_pairs(labels: Sequence[int], pairs: Iterable[tuple[int, int]], *, label: int = 0) -> Graph:
    """An undirected graph from its node labels and its edges, each given once; edge labels are 0."""
    both = [edge for a, b in pairs for edge in ((a, b), (b, a))]
    return Graph(
        nodes=torch.tensor(labels, dtype=torch.int64),
        edges=torch.tensor(both, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
        edge_labels=torch.zeros(len(both), dtype=torch.int64),
        label=label,
    )


# -- the embedded graphs --------------------------------------------------------------------------------------------


def molecules(count: int, *, noise: float = 0.0, seed: int = 0) -> GraphData:
    """Molecule-like graphs of two classes, told apart by the order of the atoms in their side chains.

    A ring of six atoms 0 carries one or two chains: 1-2 in class 0, 2-1 in class 1; up to two leaves (0 or 3); and,
    half of the time, a longer tail behind a chain. Classes have equal counts of every atom.

    Args:
        noise: share of the atoms replaced by another one.
    """
    draw = random.Random(seed)
    graphs = []
    for number in range(count):
        label = number % 2
        atoms, bonds = [0] * 6, [(i, (i + 1) % 6) for i in range(6)]

        def attach(atom: int, to: int, atoms: list[int] = atoms, bonds: list[tuple[int, int]] = bonds) -> int:
            atoms.append(atom)
            bonds.append((to, len(atoms) - 1))
            return len(atoms) - 1

        for _ in range(draw.randint(1, 2)):
            first, second = (1, 2) if label == 0 else (2, 1)
            end = attach(second, attach(first, draw.randrange(6)))
            if draw.random() < 0.5:
                attach(0, end)
        for _ in range(draw.randint(0, 2)):
            attach(draw.choice((0, 3)), draw.randrange(6))
        atoms = [(atom + draw.randint(1, 3)) % 4 if draw.random() < noise else atom for atom in atoms]
        order = draw.sample(range(len(atoms)), len(atoms))  # nothing may follow from a node's number
        place = {node: position for position, node in enumerate(order)}
        pairs = [(place[a], place[b]) for a, b in bonds]
        graphs.append(graph_from_pairs([atoms[node] for node in order], pairs, label=label))
    return GraphData(tuple(graphs), node_labels=4, edge_labels=1, classes=2, name="demo")


# -- the user's graphs ----------------------------------------------------------------------------------------------


def load_graphs(
    source: str,
    *,
    splits: Sequence[str | None] = ("train",),
    bins: int | None = None,
    label_field: str = "y",
) -> list[GraphData]:
    """Read splits of a ``.jsonl`` or ``.parquet`` file or of a data set on the hub, all with one numbering of labels.

    Args:
        splits: a file has the one split ``train``.
        bins: node and edge features that are not whole numbers are put into so many bins of equal count.
        label_field: the column with the class.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    found = _read(source)
    rows: list[list[Mapping[str, Any]]] = []
    for split in splits:
        if split not in found:
            raise DataError(f"{source}: no split {split!r}{suggest(str(split), found)}")
        rows.append(list(found[split]))
    nodes, edges, classes = _Numbering(), _Numbering(), _Numbering()
    bounds = {name: _bounds(rows[0], name, bins) for name in ("node_feat", "edge_attr")}
    read = [
        tuple(
            _graph(row, f"{source}: {split} {position}", label_field, nodes, edges, classes, bounds)
            for position, row in enumerate(part)
        )
        for split, part in zip(splits, rows, strict=True)
    ]
    ranked = {number: rank for rank, (_, number) in enumerate(sorted(classes.numbers.items()))}
    return [
        GraphData(
            tuple(replace(graph, label=ranked[graph.label]) for graph in graphs),
            len(nodes.numbers),
            max(1, len(edges.numbers)),
            len(classes.numbers),
            source,
        )
        for graphs in read
    ]


class _Numbering:
    """Numbers for labels, in the order they are met."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, label: Any) -> int:
        return self.numbers.setdefault(label, len(self.numbers))


def _read(source: str) -> Any:
    import datasets

    path = Path(source).expanduser()
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    try:
        if path.is_file():
            if path.suffix not in kinds:
                raise DataError(f"{source}: a {path.suffix or 'nameless'} file; give .jsonl or .parquet")
            return datasets.load_dataset(kinds[path.suffix], data_files=str(path))
        if path.is_absolute() or source.count("/") > 1 or path.suffix in kinds:
            raise DataError(f"{source}: no such file{near(path)}")
        return datasets.load_dataset(str(path) if path.is_dir() else source)
    except DataError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise DataError(f"{source}: no such file, and the hub cannot be reached; give a local path") from error
    except Exception as error:
        raise DataError(f"{source}: cannot be read as graphs ({one_line(error)}); check the file") from error


def _bounds(rows: Sequence[Mapping[str, Any]], name: str, bins: int | None) -> list[Tensor | None] | None:
    """Per column of a feature, the inner bounds of its bins; None if it is not to be binned."""
    if bins is None:
        return None
    values = [entry for row in rows for entry in row.get(name) or []]
    if not values or not isinstance(values[0], Sequence):
        values = [[value] for value in values]
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    columns = list(torch.tensor(values, dtype=torch.float64).T) if values else []
    return [torch.quantile(column, levels) if bool((column != column.round()).any()) else None for column in columns]


def _labels(
    values: Sequence[Any], where: str, name: str, number: _Numbering, bounds: list[Tensor | None] | None
) -> Tensor:
    labels = []
    for entry in values:
        entries = list(entry) if isinstance(entry, Sequence) else [entry]
        for column, value in enumerate(entries):
            inner = bounds[column] if bounds else None
            if inner is not None:
                entries[column] = int(torch.bucketize(torch.tensor(value, dtype=torch.float64), inner, right=True))
            elif not isinstance(value, int | float) or value != round(value):
                raise DataError(f"{where}: {name} holds {value!r}; labels are whole numbers, set bins= to make some")
            else:
                entries[column] = int(value)
        labels.append(number(tuple(entries)))
    return torch.tensor(labels, dtype=torch.int64)


def _graph(
    row: Mapping[str, Any],
    where: str,
    label_field: str,
    nodes: _Numbering,
    edges: _Numbering,
    classes: _Numbering,
    bounds: Mapping[str, list[Tensor | None] | None],
) -> Graph:
    for name in ("edge_index", label_field):
        if row.get(name) is None:
            raise DataError(f"{where}: no {name!r}{suggest(name, (k for k, v in row.items() if v is not None))}")
    index = torch.as_tensor(row["edge_index"], dtype=torch.int64).reshape(2, -1)
    features = row.get("node_feat")
    if features is None:  # IMDB-B has none: the degree stands in, as is usual
        size = int(row.get("num_nodes") or (int(index.max()) + 1 if index.numel() else 1))
        features = torch.bincount(index[1], minlength=size).tolist()
    if not features:
        raise DataError(f"{where}: a graph without nodes; take it out")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(features):
        raise DataError(f"{where}: an edge to node {int(index.max())}, but there are {len(features)} nodes")
    label = row[label_field]
    while isinstance(label, Sequence) and not isinstance(label, str) and len(label) == 1:
        label = label[0]
    if not isinstance(label, int | float | str) or label != label:
        raise DataError(f"{where}: {label_field} is {label!r}; one class a graph is needed")
    kinds = row.get("edge_attr")
    if kinds is not None and len(kinds) != index.shape[1]:
        raise DataError(f"{where}: {len(kinds)} edge labels for {index.shape[1]} edges")
    kept = {name: torch.tensor(row[name]) for name in ("degrees", "roots") if row.get(name) is not None}
    return Graph(
        nodes=_labels(features, where, "node_feat", nodes, bounds["node_feat"]),
        edges=index,
        edge_labels=torch.zeros(index.shape[1], dtype=torch.int64)
        if kinds is None
        else _labels(kinds, where, "edge_attr", edges, bounds["edge_attr"]),
        label=classes(label),
        frequency=float(row.get("frequency") or 1.0),
        **kept,
    )


def to_dataset(data: GraphData) -> Any:
    """The graphs as a ``datasets.Dataset`` with the columns `load_graphs` reads."""
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "edge_index": graph.edges.tolist(),
                "node_feat": graph.nodes[:, None].tolist(),
                "edge_attr": graph.edge_labels[:, None].tolist(),
                "y": graph.label,
                "degrees": graph.degrees.tolist(),
                "roots": graph.roots.tolist(),
                "frequency": graph.frequency,
            }
            for graph in data.graphs
        ]
    )


def from_parquet(file: Path, like: GraphData) -> GraphData:
    """The graphs that `to_dataset` wrote, in the numbering of ``like``."""
    import pyarrow.parquet as pq

    return replace(
        like,
        graphs=tuple(
            Graph(
                nodes=torch.tensor(row["node_feat"], dtype=torch.int64).flatten(),
                edges=torch.tensor(row["edge_index"], dtype=torch.int64).reshape(2, -1),
                edge_labels=torch.tensor(row["edge_attr"], dtype=torch.int64).flatten(),
                label=row["y"],
                degrees=torch.tensor(row["degrees"], dtype=torch.int64),
                roots=torch.tensor(row["roots"], dtype=torch.bool),
                frequency=float(row["frequency"]),
            )
            for row in pq.read_table(file).to_pylist()
        ),
    )
