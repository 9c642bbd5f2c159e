"""Training image classifiers on a part of the data: the teacher of the whole, the scores of the samples, the picture.

`PruningFields` are the fields of systems that choose samples; the functions here are parts of their stages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from torch import Tensor, nn

from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.crops import random_resized_crop
from stillhouse.data.images import Images, gaussian_noise, in_turn
from stillhouse.data.pruning_scores import (
    alpha_of_fraction,
    el2n_score,
    herding_score,
    moderate_score,
    prototype_score,
    random_score,
    two_views,
)
from stillhouse.data.rows import TensorRows
from stillhouse.data.sources import Augmented, Batches
from stillhouse.metrics.classification import predict
from stillhouse.metrics.sample_scores import features_of, gradient_norms, last_linear
from stillhouse.models.image_classifier import classifier_from_spec, new_image_classifier, with_classes
from stillhouse.objectives.selection import ContrastiveFeatures, ForgettingCount
from stillhouse.tasks.vision import DEMO, VisionSystem, VisionTask

Part = Annotated[float, Gt(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1)]
Selector = Literal["random", "el2n", "grand", "forgetting", "herding", "moderate", "prototypes"]


@dataclass(kw_only=True)
class PruningFields(VisionSystem):
    """Fields of systems on image classifiers that train on a part of the data, with a teacher of all of it."""

    smoke: ClassVar[dict[str, Any]] = {
        **VisionSystem.smoke,
        "sweep": [0.5],
        "fraction": 0.25,
        "probes": 2,
        "probe_epochs": 1.0,
        "selector": "forgetting",
    }

    fraction: Annotated[float, "share of the training images that is kept", Gt(0), Le(1)] = 0.1
    sweep: Annotated[list[Part], "further shares, to see the accuracy over the share"] = field(default_factory=list)
    selector: Annotated[Selector, "what says which images are kept"] = "random"
    balanced: Annotated[bool, "keep as many of each class"] = True
    keep_hard: Annotated[
        bool, "el2n, grand, forgetting, prototypes: keep what is hard for a network, not what is easy"
    ] = True
    probes: Annotated[int, "el2n, grand: networks that are asked, early in their training", Ge(1)] = 10
    probe_epochs: Annotated[float, "el2n, grand: passes over the data after which they are asked", Gt(0)] = 20.0
    feature_epochs: Annotated[float, "prototypes: passes of the training without labels", Gt(0)] = 200.0
    cost: Annotated[
        Literal["epochs", "steps"], "what is kept equal: passes, so that less data cost less; or optimizer steps"
    ] = "epochs"
    teacher_model: Annotated[
        str,
        "who teaches. student: the student's architecture, trained on all images; teacher: the one of teacher=; "
        "fraction: the former where less than half is kept, else the latter; or a size, as in student=scale:0.1",
    ] = "student"
    alpha: Annotated[float | None, "the teacher's weight; by default found by alpha_by", Ge(0), Le(1)] = None
    alpha_by: Annotated[
        Literal["fraction", "validation"], "from alpha_max down to alpha_min with the share; or the best of alpha_grid"
    ] = "fraction"
    alpha_max: Annotated[float, "where next to nothing is kept", Ge(0), Le(1)] = 1.0
    alpha_min: Annotated[float, "where all is kept", Ge(0), Le(1)] = 0.3
    alpha_grid: Annotated[list[Weight], "weights that are tried", MinLen(1)] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1]
    )

    def alphas(self, fraction: float) -> list[float]:
        """The teacher's weight for this share of the data, or those that are tried."""
        if self.alpha is not None:
            return [self.alpha]
        if self.alpha_by == "validation":
            return self.alpha_grid
        return [alpha_of_fraction(fraction, alpha_max=self.alpha_max, alpha_min=self.alpha_min)]


def steps_on(system: PruningFields, task: VisionTask, images: Images) -> int:
    """Optimizer steps of a training on a part of the images."""
    if system.steps or system.cost == "steps":
        return task.steps()
    return task.steps_of(system.epochs, images)


def teacher_of_all(system: PruningFields, task: VisionTask) -> Generator[Stage, Artifact, nn.Module]:
    """The teacher that has seen all training images; it is trained here unless `teacher` names one that is trained."""
    kind = system.teacher_model
    if kind == "fraction":
        kind = "student" if system.fraction < 0.5 else "teacher"
    if kind == "teacher" and system.teacher != DEMO and not system.teacher.startswith("new:"):
        assert task.teacher is not None
        return task.teacher
    if kind == "student":
        model = task.new_student(1)
    elif kind == "teacher":
        model = task.new_teacher()
    else:
        config: Any = classifier_from_spec(kind, _config(task.new_teacher()))
        model = new_image_classifier(with_classes(config, task.classes), seed=system.seed + 1_000)
    trained = yield task.train("teacher", task.cross_entropy, model=model)
    return task.load(trained)


def _config(model: Any) -> Any:
    return model.config


def scores_of_all(system: PruningFields, task: VisionTask, teacher: nn.Module) -> Generator[Stage, Artifact, Tensor]:
    """The stages that score all training images by the `selector`; returns the scores, (N,)."""
    selector, sign = system.selector, 1 if system.keep_hard else -1
    labels, seed = task.images.labels, system.seed
    score: Callable[[], Tensor]
    if selector == "random":
        score = lambda: random_score(len(labels), seed=seed)  # noqa: E731
    elif selector == "forgetting":
        counted = yield _forgetting(task)
        score = lambda: sign * TensorRows.read(counted.path / "forgotten.parquet").columns["count"]  # noqa: E731
    elif selector in ("el2n", "grand"):
        probes: list[Artifact] = []
        for number in range(1, system.probes + 1):
            steps = task.steps_of(system.probe_epochs)
            model = task.new_student(100 + number)
            probes.append((yield task.train(f"probe-{number}", task.cross_entropy, model=model, steps=steps)))
        of_one = _el2n if selector == "el2n" else _grand
        score = lambda: sign * torch.stack([of_one(task, task.load(one)) for one in probes]).mean(0)  # noqa: E731
    elif selector == "prototypes":
        encoder = yield _contrastive(system, task)
        classes = len(task.classes)
        score = lambda: sign * prototype_score(_features(task, task.load(encoder)), clusters=classes, seed=seed)  # noqa: E731
    else:
        by_features = herding_score if selector == "herding" else moderate_score
        score = lambda: by_features(_features(task, teacher.to(task.run.fabric.device).eval()), labels)  # noqa: E731
    scored = yield Transform("scores", lambda _: TensorRows({"score": score().double(), "label": labels}))
    return TensorRows.read(scored.data_file()).columns["score"]


def best_of(
    task: VisionTask, name: str, weights: Sequence[float], train: Callable[[str, float], Train]
) -> Generator[Stage, Artifact, tuple[Artifact, float]]:
    """The stages that train a model with each weight; the result is the most accurate one on the selection images."""
    if len(weights) == 1:
        return (yield train(name, weights[0])), weights[0]
    tried: dict[float, Artifact] = {}
    for weight in dict.fromkeys(weights):
        tried[weight] = yield train(f"{name}-alpha-{weight:g}", weight)
    best = max(tried, key=lambda one: (tried[one].metrics["accuracy"], -tried[one].metrics["val_loss"]))
    return (yield Transform(name, lambda _: task.load(tried[best]), save=task.save)), best


def _el2n(task: VisionTask, model: nn.Module) -> Tensor:
    logits, labels = predict({"model": model}, task.batches(task.images))
    return el2n_score(logits["model"], labels)


def _grand(task: VisionTask, model: nn.Module) -> Tensor:
    return gradient_norms(model, task.batches(task.images))


def _features(task: VisionTask, model: nn.Module) -> Tensor:
    return features_of(model, task.batches(task.images))


def _forgetting(task: VisionTask) -> Train:
    """A training on all images, that leaves how often each was forgotten."""
    model = task.new_student(100)
    student = Observed(model, name="probe")
    objective = ForgettingCount(student.output("logits"), len(task.images))

    def save(trained: Any, folder: Path) -> None:
        task.save(trained, folder)
        TensorRows({"count": objective.score()}).to_parquet(folder / "forgotten.parquet")

    return task.stage("probe", [task.player("probe", student, objective)], save=save)


def _contrastive(system: PruningFields, task: VisionTask) -> Train:
    """A training on all images without their labels (SimCLR): two crops of an image are alike."""
    encoder = Observed(task.new_student(100), name="encoder")
    path = last_linear(encoder.module)
    first, second = (one.tap(path, of="input") for one in (encoder, encoder.view("second")))
    stage = task.stage(
        "encoder",
        [task.player("encoder", encoder, ContrastiveFeatures(first, second))],
        steps=task.steps_of(system.feature_epochs),
    )
    batches = Batches(task.images, system.batch_size, seed=system.seed, gather=True)
    change = in_turn([random_resized_crop(0.4), gaussian_noise(0.1)])
    stage.source, stage.evaluate, stage.best = Augmented(batches, two_views(change), seed=system.seed), None, None
    return stage


# -- accuracy over the share ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """One share of the data: how much was kept, and the teacher's weight."""

    fraction: float
    count: int
    alpha: float
    mark: str  # after "student" and "baseline", the names of its rows in the evaluation


def over_fractions(shares: Sequence[Share], evaluated: Artifact) -> Evaluate:
    """A table of the accuracy over the share of the data, and its picture; figures are ``fraction/model/accuracy``."""

    def measure(context: Context) -> tuple[Table, dict[str, Any]]:
        figures = evaluated.metrics
        names = {"student": "with teacher", "baseline": "labels alone"}
        names = {model: label for model, label in names.items() if f"{model}/accuracy" in figures}
        rows: list[dict[str, Any]] = []
        for share in sorted(shares, key=lambda one: one.fraction):
            found = {model: figures[f"{model}{share.mark}/accuracy"] for model in names}
            rows.append({"name": f"{share.fraction:g}", "count": share.count, "alpha": share.alpha, **found})
            context.results |= {f"{share.fraction:g}/{model}/accuracy": value for model, value in found.items()}
            context.results[f"{share.fraction:g}/alpha"] = share.alpha
        context.results["alpha"] = shares[0].alpha
        columns = [
            Column("count", "images", ",d", None, "training images that are kept"),
            Column("alpha", "alpha", ".2f", None, "the teacher's weight"),
            *(Column(model, label, ".1%", "higher", "accuracy on the test images") for model, label in names.items()),
        ]
        lines = {label: [(float(row["name"]), row[model]) for row in rows] for model, label in names.items()}
        whole = figures.get("teacher/accuracy")
        note = "Accuracy over the share of the training images that is kept."
        return Table("Share of the data", columns, rows, [note]), {"fractions.svg": fractions_picture(lines, whole)}

    return Evaluate("fractions", measure)


def fractions_picture(lines: Mapping[str, Sequence[tuple[float, float]]], teacher: float | None) -> str:
    """An SVG of accuracies over the share of the data, with a dashed line for the teacher, which saw all of it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "stillhouse", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axis = figure.subplots()
        for (name, points), colour in zip(lines.items(), ("#0f68a9", "#c4520a", "#0b7a5c"), strict=False):
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        if teacher is not None:
            axis.axhline(teacher, color="#5b6f86", linestyle="--", label="teacher")
        ticks = sorted({share for points in lines.values() for share, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{share:g}" for share in ticks])
        axis.minorticks_off()
        axis.set(xlabel="share of the training images", ylabel="accuracy")
        axis.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
