"""NKD: the label's probability and the shares of the other classes are matched apart, the latter renormalised."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective, Weighted
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import ForwardKL, RowDivergence
from stillhouse.losses.target_split import DKD, NKD
from stillhouse.objectives.logits import LogitMatch
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.mixed_labels import label_loss, labels_entry, mixed
from stillhouse.tasks.vision import VisionSystem, VisionTask


@dataclass(kw_only=True)
class NKDVision(VisionSystem):
    """Normalised knowledge distillation (Yang et al., ICCV 2023, arXiv 2303.13005).

    Cross-entropy - p_y log q_y - gamma T^2 sum over the other classes of p^ log q^, where p^ and q^ are the teacher's
    and the student's probabilities given that the class is not the label. The defaults are those of ImageNet; for
    CIFAR-100 ``gamma`` is 3.5 and ``temperature`` 3, which wants a smaller learning rate or clipping. ``loss=kd`` and
    ``loss=dkd`` are what the paper compares with.
    """

    meta = Meta(
        card=97,
        title="NKD",
        domain="vision",
        family="logit KD, target and renormalised non-targets apart",
        citation="Yang et al. (2023), From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach "
        "with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005",
        feedback=("logits", "labels"),
        granularity="sample",
        algorithm="divergence",
        modality="image",
        role="smaller models",
    )
    demo: ClassVar = {
        **VisionSystem.demo,
        "student": "scale:0.05",
        "train_size": 300,
        "noise": 0.35,  # new in every batch: without it both networks know the images by heart
        "epochs": 150.0,
        "lr": 0.03,
        "clip": 2.0,
    }

    gamma: Annotated[float, "weight of the other classes", Ge(0)] = 1.5
    temperature: Annotated[float, "softens the other classes (dkd and kd: all)", Gt(0)] = 1.0
    weight: Annotated[float, "of the distillation loss", Ge(0)] = 1.0
    cross_entropy: Annotated[float, "weight of the labels", Ge(0)] = 1.0
    loss: Annotated[
        Literal["nkd", "dkd", "kd"], "NKD; decoupled KD, in which the others' share is not taken out; or plain KD"
    ] = "nkd"
    dkd_alpha: Annotated[float, "weight of the label against all others in loss=dkd", Ge(0)] = 1.0
    dkd_beta: Annotated[float, "weight of the other classes in loss=dkd (8 for CIFAR-100)", Ge(0)] = 0.5
    mixup: Annotated[float, "Beta parameter of mixup; 0 turns it off", Ge(0)] = 0.0
    cutmix: Annotated[float, "Beta parameter of cutmix; 0 turns it off", Ge(0)] = 0.0

    def divergence(self) -> RowDivergence:
        """What is minimised beside the cross-entropy."""
        if self.loss == "kd":
            return ForwardKL(temperature=self.temperature)
        if self.loss == "dkd":
            return DKD(alpha=self.dkd_alpha, beta=self.dkd_beta, temperature=self.temperature)
        return NKD(gamma=self.gamma, temperature=self.temperature)

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run)
        teacher = task.observed_teacher()
        mix = partial(mixed, task=task, mixup=self.mixup, cutmix=self.cutmix)
        entry = labels_entry(mixup=self.mixup, cutmix=self.cutmix)

        def objective(student: Observed) -> Objective:
            match = LogitMatch(student.output("logits"), teacher.output("logits"), self.divergence(), labels=entry)
            return Weighted(label_loss(student, entry), self.cross_entropy) + Weighted(match, self.weight)

        models = {"student": (yield mix(task.train("student", objective)))}
        if self.baseline:
            models["baseline"] = yield mix(task.train("baseline", partial(label_loss, entry=entry)))
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "nkd": {"gamma": 3.5, "temperature": 3.0, "baseline": False},
            "nkd, gamma 1.5 and T 1": {"baseline": False},
            "kd": {"loss": "kd", "temperature": 3.0, "weight": 0.5, "cross_entropy": 0.5, "baseline": False},
            "dkd": {"loss": "dkd", "temperature": 4.0, "dkd_beta": 8.0, "baseline": False},
            "labels alone": {"weight": 0.0, "baseline": False},
        }
        claim = Experiment("nkd", arms, "equal teacher, steps, batches, clipping and initial weights").claim
        accuracy = "accuracy on noisy test digits", "student/accuracy"
        return [
            claim("NKD gives a more accurate student than KD", *accuracy, "nkd", "kd"),
            claim("NKD gives a more accurate student than decoupled KD", *accuracy, "nkd", "dkd"),
            claim("NKD gives a more accurate student than the labels alone", *accuracy, "nkd", "labels alone"),
            claim(
                "so it does with the settings of ImageNet",
                *accuracy,
                "nkd, gamma 1.5 and T 1",
                "labels alone",
                scope="consequence",
            ),
        ]
