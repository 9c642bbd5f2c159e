"""Mirage: a graph data set condensed to its frequent computation trees, without training anything."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Len

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.data.condensation.itemsets import frequent_itemsets, least_counts, maximal_itemsets
from stillhouse.data.condensation.trees import TreeTable, variety
from stillhouse.data.graphs import GraphData, from_parquet, to_dataset
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.graph_pictures import draw_trees
from stillhouse.tasks.graphs import GraphSystem, GraphTask, Trained, only_accuracy, only_auc

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
        role="compression",
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
    sampling: Annotated[Literal["frequency", "uniform"], "of batches (the released code: uniform)"] = "frequency"
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
        sets: dict[str, GraphData] = {
            kind: mirage if kind == "mirage" else task.reference(kind, size=mirage.bytes()) for kind in self.compare
        }
        models: Trained = {}
        for name, data in sets.items():
            weighted = name == "mirage" and self.sampling == "frequency"
            models |= yield from task.networks(name, data, by_frequency=weighted)
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
        context.results |= {**condensed.sizes(data), **variety(trees), "mining_seconds": time.monotonic() - begun}
        return to_dataset(condensed), {"trees.svg": draw_trees(condensed)}

    def _supports(self, data: GraphData) -> list[int]:
        """The least support of each class, as a number of graphs."""
        return least_counts(self.support, data.class_sizes())

    def claims(self) -> list[Claim]:
        # 12 % of the atoms are noise: without it any few graphs suffice, and nothing can be told apart.
        sets = ("mirage", "random", "one per class")
        arms = {name: {"noise": 0.12, "support": (0.12,), "compare": (name,)} for name in sets}
        budget = "equal networks, initial weights, steps and batch sizes"
        by_size = Experiment("mirage", arms, f"{budget}, equal bytes of training data")
        by_class = Experiment("mirage", arms, budget)
        metric = "accuracy on intact test graphs, mean of GCN, GAT and GIN"
        more = "graph networks learn more from frequent tree sets than from as many bytes of graphs"
        than_one = "frequent tree sets teach more than one whole graph per class"
        chosen = {f"{name}, 5 of 10": {**arms[name], "repeats": 10, "top": 5} for name in sets[:2]}  # the paper's way
        protocol = Experiment("mirage", chosen, f"{budget}, equal bytes of training data")
        auc = "ROC-AUC on intact test graphs, of the best 5 of 10 networks by validation, mean of GCN, GAT and GIN"
        return [
            by_size.claim(more, metric, only_accuracy, "mirage", "random"),
            by_class.claim(than_one, metric, only_accuracy, "mirage", "one per class", scope="consequence"),
            protocol.claim(f"{more} (the best 5 of 10 networks)", auc, only_auc, *chosen),
        ]
