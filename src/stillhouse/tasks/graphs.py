"""The graph classification task: graphs, embedded or the user's own, and networks trained and measured on them."""

from __future__ import annotations

import copy
import random
from collections.abc import Generator, Mapping, Sequence
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
EMBEDDED_VALIDATION = 200  # graphs
Reference = Literal["random", "one per class", "full"]
Trained = dict[tuple[str, Architecture], list[Artifact]]
"""(name of the set, architecture) -> the networks that were trained."""


@dataclass(kw_only=True)
class GraphSystem(System):
    """Fields of every system on graph classification."""

    data: Annotated[str, ".jsonl or .parquet file, hub data set id (edge_index, node_feat, y), or 'demo'"] = DEMO
    split: Annotated[str, "split that is trained on"] = "train"
    test_split: Annotated[str | None, "split that is measured on; none: a part of the training split"] = None
    test: Annotated[float, "share of the graphs that is measured on where there is no test split", Gt(0), Lt(1)] = 0.2
    validation_split: Annotated[
        str | None, "split that networks are chosen by where top < repeats; none: a part of the training split"
    ] = None
    validation: Annotated[float, "share of the training graphs for that where there is no split", Gt(0), Lt(1)] = 0.1
    repeats: Annotated[int, "networks of every kind that are trained on every set", Ge(1)] = 10
    top: Annotated[int, "of them the figures are the mean over so many, the best by validation ROC-AUC", Ge(1)] = 5
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
        "repeats": 1,
        "top": 1,
    }
    smoke: ClassVar[dict[str, Any]] = {"steps": 12, "width": 8}

    def is_demo(self) -> bool:
        return self.__dict__["data"] == DEMO


@dataclass
class GraphTask:
    """What a system on graphs works with; ``validation_data`` only where networks are chosen by it."""

    system: GraphSystem
    run: Run
    train_data: GraphData
    test_data: GraphData
    validation_data: GraphData | None = None

    @staticmethod
    def prepare(system: GraphSystem, run: Run) -> GraphTask:
        """Read or make the graphs; the test graphs of the embedded task do not depend on the seed."""
        chosen = system.top < system.repeats
        if system.top > system.repeats:
            raise ConfigError(
                f"top={system.top}: there are {system.repeats} networks of a kind; lower top or raise repeats"
            )
        if system.data == DEMO:
            train = molecules(EMBEDDED_TRAIN, noise=system.noise, seed=1 + system.seed)
            validation = molecules(EMBEDDED_VALIDATION, noise=system.noise, seed=10**6) if chosen else None
            return GraphTask(system, run, train, molecules(EMBEDDED_TEST, noise=system.noise, seed=0), validation)
        named = {"train": system.split, "test": system.test_split}
        named |= {"validation": system.validation_split} if chosen else {}
        splits = {part: split for part, split in named.items() if split is not None}
        read = load_graphs(system.data, splits=list(splits.values()), bins=system.bins, label_field=system.label_field)
        found = dict(zip(splits, read, strict=True))
        for part, share in (("test", system.test), ("validation", system.validation)):
            if part in named and part not in found:
                found["train"], found[part] = _divided(system.data, found["train"], share)
        return GraphTask(system, run, found["train"], found["test"], found.get("validation"))

    def steps(self) -> int:
        """Optimizer steps of every network, whatever it is trained on."""
        system = self.system
        return system.steps or max(1, round(system.epochs * len(self.train_data) / system.batch_size))

    def train(
        self, name: str, architecture: Architecture, data: GraphData, *, by_frequency: bool = False, repeat: int = 0
    ) -> Train:
        """A stage that trains a new network on ``data``; weights and batches depend on seed and repeat only."""
        system, seed = self.system, self._seed(repeat)
        model = self.new_model(architecture, repeat=repeat)
        student = Observed(model, name=name)
        player = Player(
            name,
            student,
            CrossEntropy(student.output()),
            optimizer=adamw(system.lr, weight_decay=system.weight_decay),
        )
        source: Any = Batches(data, system.batch_size, seed=seed, collate=collate_graphs)
        if by_frequency or len(data) < system.batch_size:
            weights = torch.tensor([float(graph.frequency) if by_frequency else 1.0 for graph in data.graphs])
            source = Drawn(partial(_drawn, data, weights, system.batch_size), seed=seed)
        return Train(name, player, source=source, steps=self.steps())

    def networks(
        self, name: str, data: GraphData, *, by_frequency: bool = False
    ) -> Generator[Stage, Artifact, Trained]:
        """The stages that train ``repeats`` networks of every architecture on the set called ``name``."""
        models: Trained = {}
        for kind in self.system.architectures:
            stage = f"{kind}-{name.replace(' ', '-')}"
            models[name, kind] = []
            for repeat in range(self.system.repeats):
                own = stage if repeat == 0 else f"{stage}-{repeat + 1}"
                trained = yield self.train(own, kind, data, by_frequency=by_frequency, repeat=repeat)
                models[name, kind].append(trained)
        return models

    def _seed(self, repeat: int) -> int:
        return self.system.seed + 10_007 * repeat

    def new_model(self, architecture: Architecture, *, repeat: int = 0) -> GNN:
        """A network with random weights."""
        system, data = self.system, self.train_data
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed(repeat))
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

    def evaluation(self, sets: Mapping[str, GraphData], models: Trained) -> Evaluate:
        """Accuracy and ROC-AUC on intact test graphs, of every network by the set it was trained on."""
        return Evaluate("evaluation", partial(self._evaluate, sets, models))

    def _evaluate(self, sets: Mapping[str, GraphData], models: Trained, context: Context) -> Table:
        system = self.system
        rows: list[dict[str, Any]] = []
        for (name, architecture), artifacts in models.items():
            best = self._best(architecture, artifacts)
            measured = torch.tensor([self._measure(model, self.test_data) for model in best], dtype=torch.float64)
            accuracy, auc = measured.mean(0).tolist()
            spread = {"auc_std": measured[:, 1].std().item()} if len(best) > 1 else {}
            figures = {"accuracy": accuracy, "auc": auc, **spread}
            sizes = sets[name].sizes(self.train_data)
            rows.append({"name": f"{name}, {architecture.upper()}", "set": name, **sizes, **figures})
            context.results |= {f"{name}/{architecture}/{key}": value for key, value in figures.items()}
        for name in sets:
            own = [row for row in rows if row["set"] == name]
            for figure in ("accuracy", "auc"):
                context.results[f"{name}/{figure}"] = sum(row[figure] for row in own) / len(own)
            context.results[f"{name}/smaller"] = own[0]["smaller"]
        notes = [f"{len(self.test_data)} test graphs."]
        if self.validation_data is not None:
            notes.append(
                f"Means over the {system.top} of {system.repeats} networks that are best by ROC-AUC on "
                f"{len(self.validation_data)} validation graphs."
            )
        columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
        return Table("Networks on intact test graphs", columns, rows, notes)

    def _best(self, architecture: Architecture, artifacts: Sequence[Artifact]) -> list[torch.nn.Module]:
        """The networks that figures are of: the ``top`` by ROC-AUC on the validation graphs; of equals the earlier."""
        new = self.new_model(architecture)
        models = [artifact.load_into(copy.deepcopy(new)).to(self.run.fabric.device).eval() for artifact in artifacts]
        if self.validation_data is None:
            return models
        worth = [self._measure(model, self.validation_data)[1] for model in models]
        order = sorted(range(len(models)), key=lambda number: -worth[number])
        return [models[number] for number in order[: self.system.top]]

    @torch.no_grad()
    def _measure(self, model: torch.nn.Module, data: GraphData) -> tuple[float, float]:
        """Accuracy and ROC-AUC on intact graphs."""
        logits, labels = [], []
        for start in range(0, len(data), EVALUATION_BATCH):
            batch = self.run.fabric.to_device(collate_graphs(data.graphs[start : start + EVALUATION_BATCH]))
            labels.append(batch.pop("labels").cpu())
            logits.append(model(**batch).float().cpu())
        probabilities_NV, labels_N = torch.cat(logits).softmax(-1), torch.cat(labels)
        accuracy = (probabilities_NV.argmax(-1) == labels_N).double().mean().item()
        return accuracy, macro_roc_auc(probabilities_NV, labels_N)


def only_accuracy(figures: Mapping[str, float]) -> float:
    """The mean accuracy of the networks, from the figures of an evaluation with one set of graphs."""
    return next(value for key, value in figures.items() if key.count("/") == 1 and "accuracy" in key)


def only_auc(figures: Mapping[str, float]) -> float:
    """Likewise their mean ROC-AUC."""
    return next(value for key, value in figures.items() if key.count("/") == 1 and key.endswith("/auc"))


def _divided(name: str, data: GraphData, share: float) -> tuple[GraphData, GraphData]:
    """The graphs without ``share`` of them, and these; the same whatever the seed."""
    order = random.Random(0).sample(range(len(data)), len(data))
    held_out = max(1, round(share * len(order)))
    if held_out >= len(order):
        raise ConfigError(f"data={name!r}: {len(order)} graph(s) cannot be divided; give more")
    return data.take(order[held_out:]), data.take(order[:held_out])


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
    Column("auc_std", "± (networks)", ".3f", None, "standard deviation of the ROC-AUC over the networks"),
]
