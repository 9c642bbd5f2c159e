"""USKD: a classifier makes its own soft labels, from its own certainty and a ranking of the other classes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.self_targets import SelfTargets, image_feature
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.mixed_labels import label_loss, labels_entry, mixed
from stillhouse.tasks.vision import VisionSystem, VisionTask


@dataclass(kw_only=True)
class USKD(VisionSystem):
    """Universal self-knowledge distillation with customised soft labels (Yang et al., ICCV 2023, arXiv 2303.13005).

    Three losses are added to the cross-entropy: the label with weight q_y^2 + 1 - mean(q_y^2); the other classes with
    shares by Zipf's law, ranked by the model's opinion and that of a linear head on an inner feature; and that head's
    own cross-entropy. The head is dropped in the end. There is no teacher; ``teacher`` only names the architecture that
    ``student`` scales. The defaults are those of ImageNet; for CIFAR-100 they are 0.1, 0.1, 0.1.
    """

    meta = Meta(
        card=97,
        title="USKD",
        domain="vision",
        family="self-distillation, customised soft labels",
        citation="Yang et al. (2023), From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach "
        "with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005",
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
        "student": "scale:0.05",
        "train_size": 300,
        "noise": 0.35,  # new in every batch: without it the network knows the images by heart
        "epochs": 150.0,
        "lr": 0.03,
        "clip": 2.0,
        "alpha": 0.1,
        "mu": 0.1,
    }

    student: Annotated[str, "directory, hub id, new:NAME, or the teacher's architecture made smaller"] = "scale:1"
    alpha: Annotated[float, "weight of the smoothed target", Ge(0)] = 1.0
    beta: Annotated[float, "weight of the ranked other classes", Ge(0)] = 0.1
    mu: Annotated[float, "weight of the inner head's own loss", Ge(0)] = 0.005
    feature: Annotated[
        str | None, "sub-module whose output the inner head reads; by default the last but one of the stages or blocks"
    ] = None
    weak_smoothing: Annotated[float, "label smoothing of the inner head", Ge(0), Lt(1)] = 0.1
    mixup: Annotated[float, "Beta parameter of mixup; 0 turns it off", Ge(0)] = 0.0
    cutmix: Annotated[float, "Beta parameter of cutmix; 0 turns it off", Ge(0)] = 0.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=False)
        mix = partial(mixed, task=task, mixup=self.mixup, cutmix=self.cutmix)
        entry = labels_entry(mixup=self.mixup, cutmix=self.cutmix)

        def objective(student: Observed) -> Objective:
            own = SelfTargets(
                student.output("logits"),
                image_feature(student, self.feature),
                classes=len(task.classes),
                a=self.alpha,
                b=self.beta,
                mu=self.mu,
                smoothing=self.weak_smoothing,
                target=entry,
            )
            return label_loss(student, entry) + own

        models = {"student": (yield mix(task.train("student", objective)))}
        if self.baseline:
            models["baseline"] = yield mix(task.train("baseline", partial(label_loss, entry=entry)))
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "uskd": {"baseline": False},
            "uskd, settings of ImageNet": {"alpha": 1.0, "mu": 0.005, "baseline": False},
            "labels alone": {"alpha": 0.0, "beta": 0.0, "mu": 0.0, "baseline": False},
        }
        claim = Experiment("uskd", arms, "equal steps, batches and initial weights", seeds=5).claim
        accuracy = "accuracy on noisy test digits", "student/accuracy"
        better = "its own soft labels make a classifier more accurate than the labels alone"
        nll = "mean negative log-likelihood on noisy test digits, nats", "student/nll"
        return [
            claim(better, *accuracy, "uskd", "labels alone"),
            claim(f"{better} (the settings of ImageNet)", *accuracy, "uskd, settings of ImageNet", "labels alone"),
            claim(
                "its own soft labels give the right class more probability",
                *nll,
                "uskd",
                "labels alone",
                higher_is_better=False,
                scope="consequence",
            ),
        ]
