"""Computation trees: what an L-layer message-passing network sees of a graph from one of its nodes.

The tree of a node has the node as its root; the children of a node at depth d < L are all its neighbours, the one it
was reached from included. Equal trees get equal embeddings. Trees are never unfolded to be compared: a tree of depth d
is its root's label with the sorted numbers of its neighbours' trees of depth d - 1, as in colour refinement
(Weisfeiler and Leman, 1968), so numbering all trees of a graph takes L passes over its edges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from stillhouse.data.graphs import Graph


class Node(NamedTuple):
    """A tree: its root's label, and (edge label, tree) of each child; ``leaf`` says that the tree was cut there.

    ``degree`` is set on leaves that are told apart by it.
    """

    label: int
    children: tuple[tuple[int, int], ...] = ()
    leaf: bool = False
    degree: int = -1


@dataclass
class TreeTable:
    """Computation trees by number; equal trees have equal numbers.

    Args:
        hops: depth of the trees: as many as the network has layers.
        leaf_degrees: leaves of different degree are different. The symmetric normalisation of a GCN reads the degree
            of a node's neighbours, so that only then its embeddings follow from the tree; sums, means and attention
            do not.
    """

    hops: int
    leaf_degrees: bool = False
    nodes: list[Node] = field(default_factory=list)
    seen_degrees: list[int] = field(default_factory=list)  # of each tree's root where it was first met
    _numbers: dict[Node, int] = field(default_factory=dict)

    def number(self, node: Node, degree: int) -> int:
        """The number of a tree, a new one if it has not been met."""
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
            self.seen_degrees.append(degree)
        return self._numbers[node]

    def trees_of(self, graph: Graph) -> list[int]:
        """The number of every node's tree, in the order of the nodes."""
        neighbours: list[list[tuple[int, int]]] = [[] for _ in range(len(graph))]
        for source, target, label in zip(*graph.edges.tolist(), graph.edge_labels.tolist(), strict=True):
            neighbours[target].append((label, source))
        labels = graph.nodes.tolist()
        degrees = [len(found) for found in neighbours]
        current = [
            self.number(Node(label, leaf=True, degree=degree if self.leaf_degrees else -1), degree)
            for label, degree in zip(labels, degrees, strict=True)
        ]
        for _ in range(self.hops):
            current = [
                self.number(Node(label, tuple(sorted((kind, current[other]) for kind, other in near))), len(near))
                for label, near in zip(labels, neighbours, strict=True)
            ]
        return current

    def size(self, tree: int) -> int:
        """How many nodes the unfolded tree has."""
        while len(self._sizes) <= tree:  # children have smaller numbers than their parents
            self._sizes.append(1 + sum(self._sizes[child] for _, child in self.nodes[len(self._sizes)].children))
        return self._sizes[tree]

    @cached_property
    def _sizes(self) -> list[int]:
        return []

    def text(self, tree: int) -> str:
        """The canonical string: the label, then the children's edge labels and strings, sorted.

        It depends on the tree alone, not on the table; two trees of one depth are isomorphic if their strings agree.
        """
        node = self.nodes[tree]
        degree = f"#{node.degree}" if node.degree >= 0 else ""
        inner = ",".join(sorted(f"{kind}:{self.text(child)}" for kind, child in node.children))
        return f"{node.label}{degree}" + (f"({inner})" if inner else "")

    def unfold(self, trees: list[int], label: int, frequency: float = 1.0) -> Graph:
        """The disjoint union of the trees as a graph of class ``label``: edges from child to parent, roots marked.

        Nodes keep the degree they had in the data; of leaves whose degree the tree does not tell, it is that of the
        first leaf of this label that was met.
        """
        nodes: list[int] = []
        degrees: list[int] = []
        roots: list[bool] = []
        edges: list[tuple[int, int]] = []
        edge_labels: list[int] = []
        for tree in trees:
            waiting = [(tree, -1, 0)]
            while waiting:
                number, parent, kind = waiting.pop()
                node = self.nodes[number]
                place = len(nodes)
                nodes.append(node.label)
                degrees.append(self.seen_degrees[number])
                roots.append(parent < 0)
                if parent >= 0:
                    edges.append((place, parent))
                    edge_labels.append(kind)
                waiting.extend((child, place, edge) for edge, child in reversed(node.children))
        return Graph(
            nodes=torch.tensor(nodes, dtype=torch.int64),
            edges=torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
            edge_labels=torch.tensor(edge_labels, dtype=torch.int64),
            label=label,
            degrees=torch.tensor(degrees, dtype=torch.int64),
            roots=torch.tensor(roots, dtype=torch.bool),
            frequency=frequency,
        )


def variety(trees: Iterable[Sequence[int]]) -> dict[str, float]:
    """How many distinct trees the nodes of some graphs have, and what share of them makes up 80 % of all nodes."""
    counts = Counter(tree for own in trees for tree in own)
    return {"distinct_trees": len(counts), "trees_for_80_percent": coverage(list(counts.values()), 0.8)}


def coverage(counts: list[int], share: float) -> float:
    """The share of the distinct trees, the most frequent first, that makes up ``share`` of all occurrences."""
    wanted, total = share * sum(counts), 0
    for taken, count in enumerate(sorted(counts, reverse=True), start=1):
        total += count
        if total >= wanted:
            return taken / len(counts)
    return 1.0
