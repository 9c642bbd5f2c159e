"""Mirage: a graph data set condensed to its frequent computation trees, without training anything."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Len

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.data.condensation.itemsets import frequent_itemsets, maximal_itemsets
from stillhouse.data.condensation.trees import TreeTable, coverage
from stillhouse.data.graphs import GraphData, from_parquet, to_dataset
from stillhouse.models.gnn import Architecture
from stillhouse.tasks.graph_pictures import draw_trees
from stillhouse.tasks.graphs import GraphSystem, GraphTask

TrainedOn = Literal["mirage", "random", "one per class", "full"]


@dataclass(kw_only=True)
class Mirage(GraphSystem):
    """Mirage: model-agnostic graph distillation for graph classification (Gupta et al., ICLR 2024, arXiv 2310.09486).

    A graph becomes the set of its nodes' computation trees, as deep as the network has layers. Sets of trees that many
    graphs of a class share become the condensed graphs: disjoint unions of the trees, of which only roots are pooled.
    Nothing is trained to find them, so they serve any message-passing network. The paper sets ``support`` by data set
    (150 and 104 graphs of the two classes of ogbg-molbace, about a fifth of each).
    """

    meta = Meta(
        card=78,
        title="Mirage",
        domain="graph",
        family="data set condensation by frequent computation trees",
        citation="Gupta, Manchanda, Kodamana and Ranu (2024), Mirage: Model-Agnostic Graph Distillation for Graph "
        "Classification, ICLR 2024, arXiv 2310.09486",
        feedback="data",
        teacher_access="teacher-free",
        granularity="data set",
        policy="none",
        elicitation="curation",
        algorithm="condensation",
        knowledge="data",
        scheme="none",
        modality="graph",
        stages="1, and one for each network measured",
    )
    demo: ClassVar = {**GraphSystem.demo, "support": (0.25,), "sets": "maximal"}
    smoke: ClassVar = {**GraphSystem.smoke, "architectures": ("gcn", "gin"), "compare": ("mirage", "random")}
    product: ClassVar[str] = "condensed"

    support: Annotated[
        tuple[Annotated[float, Gt(0)], ...],
        "least number of graphs that share a set of trees, or their share of the class if below 1; one for each class, "
        "or one for all",
        Len(1),
    ] = (0.2,)
    sets: Annotated[Literal["all", "maximal"], "keep every frequent set, or those that no other contains"] = "all"
    sampling: Annotated[
        Literal["frequency", "uniform"], "how the networks' batches are drawn (the released code: uniform)"
    ] = "frequency"
    leaf_degrees: Annotated[bool, "tell leaves apart by degree: trees are then exact for GCNs too, but more"] = False
    compare: Annotated[
        tuple[TrainedOn, ...],
        "sets the networks are trained on; random: whole graphs of Mirage's size in bytes",
        Len(1),
    ] = ("mirage", "random", "one per class", "full")

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = GraphTask.prepare(self, run)
        condensed = yield Transform("condensed", partial(self.condense, task.train_data))
        mirage = from_parquet(condensed.data_file(), task.train_data)
        makers = {
            "mirage": lambda: mirage,
            "random": lambda: task.random_subset(mirage.bytes()),
            "one per class": lambda: task.random_subset(0),
            "full": lambda: task.train_data,
        }
        sets: dict[str, GraphData] = {name: makers[name]() for name in self.compare}
        models: dict[tuple[str, Architecture], Artifact] = {}
        for name, data in sets.items():
            by_frequency = name == "mirage" and self.sampling == "frequency"
            for architecture in self.architectures:
                stage = task.train(
                    f"{architecture}-{name.replace(' ', '-')}", architecture, data, by_frequency=by_frequency
                )
                models[name, architecture] = yield stage
        yield task.evaluation(sets, models)

    def condense(self, data: GraphData, context: Context) -> tuple[Any, dict[str, str]]:
        """The condensed data set, one graph for each frequent set of each class, and a picture of some."""
        begun = time.monotonic()
        table = TreeTable(self.layers, leaf_degrees=self.leaf_degrees)
        trees = [table.trees_of(graph) for graph in data.graphs]
        mine = frequent_itemsets if self.sets == "all" else maximal_itemsets
        graphs = []
        for label, least in enumerate(self._supports(data)):
            rows = [  # a node without neighbours tells nothing of structure
                {tree for tree in own if table.nodes[tree].children}
                for graph, own in zip(data.graphs, trees, strict=True)
                if graph.label == label
            ]
            found = mine(rows, least)
            if not found:
                raise ConfigError(f"no tree is in {least} graphs of class {label}; lower support={self.support}")
            graphs += [table.unfold(sorted(items), label, count) for items, count in found.items()]
        condensed = replace(data, graphs=tuple(graphs))
        counts = Counter(tree for own in trees for tree in own)
        context.results |= {
            "graphs": len(condensed),
            "bytes": condensed.bytes(),
            "smaller": data.bytes() / condensed.bytes(),
            "distinct_trees": len(counts),
            "trees_for_80_percent": coverage(list(counts.values()), 0.8),
            "mining_seconds": time.monotonic() - begun,
        }
        return to_dataset(condensed), {"trees.svg": draw_trees(condensed)}

    def _supports(self, data: GraphData) -> list[int]:
        """The least support of each class, as a number of graphs."""
        sizes = [sum(graph.label == label for graph in data.graphs) for label in range(data.classes)]
        if 0 in sizes:
            raise DataError(f"{data.name}: no training graph of class {sizes.index(0)}; divide the data otherwise")
        given = self.support * data.classes if len(self.support) == 1 else self.support
        if len(given) != data.classes:
            raise ConfigError(f"support={self.support}: {len(given)} values for {data.classes} classes")
        return [max(1, round(own * size)) if own < 1 else round(own) for own, size in zip(given, sizes, strict=True)]

    def claims(self) -> list[Claim]:
        # 12 % of the atoms are noise: without it any few graphs suffice, and nothing can be told apart.
        common = {"noise": 0.12, "support": (0.12,)}

        def claim(statement: str, baseline: TrainedOn, scope: Literal["central", "consequence"]) -> Claim:
            return Claim(
                statement=statement,
                metric="accuracy on intact test graphs, mean of GCN, GAT and GIN",
                method="mirage",
                baseline=baseline,
                variants={name: ("mirage", {**common, "compare": (name,)}) for name in ("mirage", baseline)},
                measure=_accuracy,
                higher_is_better=True,
                scope=scope,
                seeds=3,
                budget="equal networks, initial weights, steps and batch sizes"
                + (", equal bytes of training data" if baseline == "random" else ""),
            )

        return [
            claim(
                "graph networks learn more from frequent tree sets than from as many bytes of graphs",
                "random",
                "central",
            ),
            claim("frequent tree sets teach more than one whole graph per class", "one per class", "consequence"),
        ]


def _accuracy(artifacts: Any) -> float:
    """Of the networks trained on the one set that was compared."""
    return next(
        value for key, value in artifacts["evaluation"].metrics.items() if key.count("/") == 1 and "accuracy" in key
    )
