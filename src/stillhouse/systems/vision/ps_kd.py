"""PS-KD: a classifier is its own teacher, an epoch ago."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.memory import (
    ByEpoch,
    PredictionMemory,
    RefinedTargets,
    RememberedTargets,
    SnapshotTargets,
)
from stillhouse.tasks.vision import VisionSystem, VisionTask


@dataclass(kw_only=True)
class PSKD(VisionSystem):
    """Self-knowledge distillation with progressive refinement of targets (Kim et al., ICCV 2021, arXiv 2006.12000).

    In epoch t of T the target of a sample is (1 - a_t) label + a_t (what the model said of it in epoch t - 1), with
    a_t = ``alpha`` t / T. There is no other teacher; ``teacher`` only names the architecture that ``student`` scales.
    """

    meta = Meta(
        card=76,
        title="PS-KD",
        domain="vision",
        family="self-distillation, target softening",
        citation="Kim et al. (2021), Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021, "
        "arXiv 2006.12000",
        feedback=("logits", "labels"),
        teacher_access="teacher-free",
        granularity="sample",
        elicitation="self-knowledge",
        algorithm="divergence",
        scheme="self",
        modality="image",
        role="self-improvement",
    )
    demo: ClassVar = {
        **VisionSystem.demo,
        "train_size": 300,
        "label_noise": 0.2,
        "shift": 1,  # the paper's crops: without, the past opinion of a memorised image is its label
        "epochs": 120.0,
    }
    smoke: ClassVar = {**VisionSystem.smoke, "train_size": 300}  # 22 steps are more than five epochs

    student: Annotated[str, "directory, hub id, new:NAME, or the teacher's architecture made smaller"] = "scale:1"
    alpha: Annotated[float, "weight of the model's own opinion in the last epoch", Ge(0), Le(1)] = 0.8
    past: Annotated[
        Literal["table", "snapshot"],
        "the past opinion: kept in a table by sample, or asked anew of the weights of the last epoch's end",
    ] = "table"
    table_precision: Annotated[Literal["float32", "float16"], "of the table of past opinions"] = "float32"
    label_smoothing: Annotated[float, "share of the label spread over all classes", Ge(0), Lt(1)] = 0.0
    epochs: Annotated[float, "passes over the training images", Gt(0)] = 300.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=False)
        alpha = ByEpoch(self.alpha, task.passes_of(task.steps()))

        def objective(student: Observed) -> RefinedTargets:
            if self.past == "snapshot":
                return SnapshotTargets(student, alpha=alpha, label_smoothing=self.label_smoothing)
            dtype = getattr(torch, self.table_precision)
            memory = PredictionMemory(len(task.images), len(task.classes), dtype=dtype)
            logits = student.output("logits")
            return RememberedTargets(logits, memory, alpha=alpha, label_smoothing=self.label_smoothing)

        models = {"student": (yield task.train("student", objective))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        few: dict[str, Any] = {"train_size": 100, "batch_size": 32, "label_noise": 0.0, "baseline": False}
        arms: dict[str, dict[str, Any]] = {
            "ps-kd": {},
            "labels alone": {"alpha": 0.0},
            "label smoothing": {"alpha": 0.0, "label_smoothing": 0.1},
        }
        settings: dict[str, dict[str, Any]] = {
            "a fifth of 300 labels wrong": {"baseline": False},
            "100 right labels": few,
        }
        metrics = {
            "ece": "expected calibration error, 15 bins",
            "nll": "mean negative log-likelihood",
            "aurc": "area under the risk-coverage curve",
            "accuracy": "accuracy",
        }

        def claim(setting: str, figure: str, against: str, statement: str) -> Claim:
            return Claim(
                statement=f"{statement} ({setting})",
                metric=f"{metrics[figure]} on test digits, whose labels are right",
                method="ps-kd",
                baseline=against,
                variants={name: ("ps-kd", {**settings[setting], **own}) for name, own in arms.items()},
                measure=lambda artifacts: artifacts["evaluation"].metrics[f"student/{figure}"],
                higher_is_better=figure == "accuracy",
                scope="central" if against == "labels alone" else "consequence",
                seeds=3,
                budget="equal steps, batches and initial weights",
            )

        better = "targets mixed with its own past opinion make a classifier better than its labels alone do"
        smoothed = "its own past opinion calibrates a classifier better than labels smoothed by 0.1"
        pairs = [(setting, figure) for setting in settings for figure in metrics]
        return [
            *(claim(setting, figure, "labels alone", better) for setting, figure in pairs),
            *(claim(setting, "ece", "label smoothing", smoothed) for setting in settings),
        ]
