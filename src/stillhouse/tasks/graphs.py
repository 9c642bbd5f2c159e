"""The graph classification task: graphs, embedded or the user's own, and networks trained and measured on them."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.graphs import (
    EMBEDDED_TEST,
    EMBEDDED_TRAIN,
    GraphData,
    collate_graphs,
    load_graphs,
    molecules,
)
from stillhouse.data.sources import Batches, Drawn
from stillhouse.metrics.ranking import macro_roc_auc
from stillhouse.models.gnn import GNN, Architecture
from stillhouse.objectives.logits import CrossEntropy

DEMO = "demo"
EVALUATION_BATCH = 256
Reference = Literal["random", "one per class", "full"]


@dataclass(kw_only=True)
class GraphSystem(System):
    """Fields of every system on graph classification."""

    data: Annotated[str, ".jsonl or .parquet file, hub data set id (edge_index, node_feat, y), or 'demo'"] = DEMO
    split: Annotated[str, "split that is trained on"] = "train"
    test_split: Annotated[str | None, "split that is measured on; none: a part of the training split"] = None
    test: Annotated[float, "share of the graphs that is measured on where there is no test split", Gt(0), Lt(1)] = 0.2
    label_field: Annotated[str, "column that holds the class"] = "y"
    bins: Annotated[int | None, "make labels of features that are not whole numbers, in so many bins", Ge(2)] = None
    noise: Annotated[float, "on the demo graphs: share of the atoms replaced by others", Ge(0), Le(1)] = 0.0
    architectures: Annotated[tuple[Architecture, ...], "networks trained on every set: gcn, gat, gin"] = (
        "gcn",
        "gat",
        "gin",
    )
    layers: Annotated[int, "layers of the networks", Ge(1)] = 3
    width: Annotated[int, "of the networks", Ge(4)] = 128
    dropout: Annotated[float, "of the networks", Ge(0), Lt(1)] = 0.6
    batch_size: Annotated[int, "graphs in a batch", Ge(1)] = 128
    steps: Annotated[int | None, "optimizer steps of every network; by default as many as the epochs need", Ge(1)] = (
        None
    )
    epochs: Annotated[float, "passes over the whole training set; condensed sets get as many steps", Gt(0)] = 30.0
    lr: Annotated[float, "learning rate of AdamW", Gt(0)] = 1e-3
    weight_decay: Annotated[float, "weight decay of AdamW", Ge(0)] = 1e-2

    demo: ClassVar[dict[str, Any]] = {
        "layers": 2,
        "width": 32,
        "dropout": 0.0,
        "batch_size": 32,
        "steps": 200,
        "lr": 5e-3,
        "weight_decay": 0.0,
    }
    smoke: ClassVar[dict[str, Any]] = {"steps": 12, "width": 8}

    def is_demo(self) -> bool:
        return self.__dict__["data"] == DEMO


@dataclass
class GraphTask:
    """What a system on graphs works with."""

    system: GraphSystem
    run: Run
    train_data: GraphData
    test_data: GraphData

    @staticmethod
    def prepare(system: GraphSystem, run: Run) -> GraphTask:
        """Read or make the graphs; the test graphs of the embedded task do not depend on the seed."""
        if system.data == DEMO:
            train = molecules(EMBEDDED_TRAIN, noise=system.noise, seed=1 + system.seed)
            return GraphTask(system, run, train, molecules(EMBEDDED_TEST, noise=system.noise, seed=0))
        splits = [system.split] if system.test_split is None else [system.split, system.test_split]
        found = load_graphs(system.data, splits=splits, bins=system.bins, label_field=system.label_field)
        if len(found) == 2:
            return GraphTask(system, run, *found)
        order = random.Random(0).sample(range(len(found[0])), len(found[0]))
        held_out = max(1, round(system.test * len(order)))
        if held_out >= len(order):
            raise ConfigError(f"data={system.data!r}: {len(order)} graph(s) cannot be divided; give more")
        return GraphTask(system, run, found[0].take(order[held_out:]), found[0].take(order[:held_out]))

    def steps(self) -> int:
        """Optimizer steps of every network, whatever it is trained on."""
        system = self.system
        return system.steps or max(1, round(system.epochs * len(self.train_data) / system.batch_size))

    def train(self, name: str, architecture: Architecture, data: GraphData, *, by_frequency: bool = False) -> Train:
        """A stage that trains a new network on ``data``; the initial weights depend on the seed only."""
        system = self.system
        model = self.new_model(architecture)
        student = Observed(model, name=name)
        player = Player(
            name,
            student,
            CrossEntropy(student.output()),
            optimizer=adamw(system.lr, weight_decay=system.weight_decay),
        )
        source: Any = Batches(data, system.batch_size, seed=system.seed, collate=collate_graphs)
        if by_frequency or len(data) < system.batch_size:
            weights = torch.tensor([float(graph.frequency) if by_frequency else 1.0 for graph in data.graphs])
            source = Drawn(partial(_drawn, data, weights, system.batch_size), seed=system.seed)
        return Train(name, player, source=source, steps=self.steps())

    def networks(
        self, name: str, data: GraphData, *, by_frequency: bool = False
    ) -> Generator[Stage, Artifact, dict[tuple[str, Architecture], Artifact]]:
        """The stages that train a network of every architecture on the set called ``name``."""
        models = {}
        for kind in self.system.architectures:
            stage = self.train(f"{kind}-{name.replace(' ', '-')}", kind, data, by_frequency=by_frequency)
            models[name, kind] = yield stage
        return models

    def new_model(self, architecture: Architecture) -> GNN:
        """A network with random weights."""
        system, data = self.system, self.train_data
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(system.seed)
            return GNN(
                architecture,
                node_labels=max(data.node_labels, self.test_data.node_labels),
                edge_labels=max(data.edge_labels, self.test_data.edge_labels),
                classes=data.classes,
                layers=system.layers,
                width=system.width,
                dropout=system.dropout,
            )

    def reference(self, kind: Reference, *, size: int) -> GraphData:
        """Whole graphs to compare a condensed set of ``size`` bytes with."""
        return self.train_data if kind == "full" else self.random_subset(size if kind == "random" else 0)

    def random_subset(self, size: int, *, least: int = 1) -> GraphData:
        """Whole graphs, drawn by the seed, that fill ``size`` bytes; at least ``least`` of every class."""
        order = random.Random(self.system.seed).sample(range(len(self.train_data)), len(self.train_data))
        labels = [self.train_data[position].label for position in order]
        chosen = [
            position
            for label in range(self.train_data.classes)
            for position in [p for p, own in zip(order, labels, strict=True) if own == label][:least]
        ]
        used = sum(self.train_data[position].bytes() for position in chosen)
        for position in order:
            cost = self.train_data[position].bytes()
            if position not in chosen and used + cost <= size:
                chosen.append(position)
                used += cost
        return self.train_data.take(chosen)

    def evaluation(
        self, sets: Mapping[str, GraphData], models: Mapping[tuple[str, Architecture], Artifact]
    ) -> Evaluate:
        """Accuracy and ROC-AUC on intact test graphs, of every network by the set it was trained on."""
        return Evaluate("evaluation", partial(self._evaluate, sets, models))

    def _evaluate(
        self,
        sets: Mapping[str, GraphData],
        models: Mapping[tuple[str, Architecture], Artifact],
        context: Context,
    ) -> Table:
        rows: list[dict[str, Any]] = []
        for (name, architecture), artifact in models.items():
            model = artifact.load_into(self.new_model(architecture)).to(self.run.fabric.device).eval()
            accuracy, auc = self._measure(model)
            rows.append(
                {
                    "name": f"{name}, {architecture.upper()}",
                    "set": name,
                    **sets[name].sizes(self.train_data),
                    "accuracy": accuracy,
                    "auc": auc,
                }
            )
            context.results |= {f"{name}/{architecture}/accuracy": accuracy, f"{name}/{architecture}/auc": auc}
        for name in sets:
            own = [row for row in rows if row["set"] == name]
            for figure in ("accuracy", "auc"):
                context.results[f"{name}/{figure}"] = sum(row[figure] for row in own) / len(own)
            context.results[f"{name}/smaller"] = own[0]["smaller"]
        return Table("Networks on intact test graphs", COLUMNS, rows, [f"{len(self.test_data)} test graphs."])

    @torch.no_grad()
    def _measure(self, model: torch.nn.Module) -> tuple[float, float]:
        logits, labels = [], []
        graphs = self.test_data.graphs
        for start in range(0, len(graphs), EVALUATION_BATCH):
            batch = self.run.fabric.to_device(collate_graphs(graphs[start : start + EVALUATION_BATCH]))
            labels.append(batch.pop("labels").cpu())
            logits.append(model(**batch).float().cpu())
        probabilities_NV, labels_N = torch.cat(logits).softmax(-1), torch.cat(labels)
        accuracy = (probabilities_NV.argmax(-1) == labels_N).double().mean().item()
        return accuracy, macro_roc_auc(probabilities_NV, labels_N)


def only_accuracy(figures: Mapping[str, float]) -> float:
    """The mean accuracy of the networks, from the figures of an evaluation with one set of graphs."""
    return next(value for key, value in figures.items() if key.count("/") == 1 and "accuracy" in key)


def _drawn(data: GraphData, weights: torch.Tensor, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch of graphs drawn with replacement in proportion to ``weights``."""
    picked = torch.multinomial(weights, count, replacement=True, generator=generator)
    return collate_graphs([data[position] for position in picked.tolist()])


COLUMNS = [
    Column("graphs", "graphs", ",d", None, "in the set that it was trained on"),
    Column("bytes", "bytes", ",d", "lower", "of that set, stored compactly"),
    Column("smaller", "times smaller", ".1f", "higher", "than the whole training set"),
    Column("accuracy", "accuracy", ".1%", "higher"),
    Column("auc", "ROC-AUC", ".3f", "higher", "one class against the rest, mean over classes"),
]
