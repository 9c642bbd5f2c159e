"""BD-KD: teacher and student learn together, and the student's divergence is balanced sample by sample."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.balanced import EntropyBalancedKL
from stillhouse.losses.divergences import ForwardKL, ReverseKL, RowDivergence
from stillhouse.objectives.mutual import with_peers
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.vision import VisionSystem, VisionTask


@dataclass(kw_only=True)
class BDKD(VisionSystem):
    """Balancing the divergences for online knowledge distillation (Amara et al., 2022, arXiv 2212.12965).

    The student adds to the cross-entropy a KL(teacher || student) + b KL(student || teacher), with b = ``nu`` where it
    is less confident than the teacher and a = ``nu`` elsewhere. The teacher, which learns at the same time, adds
    KL(teacher || student). ``exchange=dml`` is deep mutual learning: both add the KL that has the learner second.
    """

    meta = Meta(
        card=120,
        title="BD-KD",
        domain="vision",
        family="online logit KD, forward and reverse KL balanced",
        citation="Amara et al. (2022), BD-KD: Balancing the Divergences for Online Knowledge Distillation, "
        "arXiv 2212.12965",
        feedback=("logits", "labels"),
        granularity="sample",
        algorithm="divergence",
        scheme="online",
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

    nu: Annotated[float, "weight of the direction of the KL that the student needs more; the other has 1", Gt(0)] = 2.0
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 1.0
    weight: Annotated[float, "of what the networks learn from each other; 0: each from the labels alone", Ge(0)] = 1.0
    exchange: Annotated[Literal["bd-kd", "dml"], "what they learn from each other"] = "bd-kd"
    students: Annotated[int, "students that learn together; the first one is the result", Ge(1)] = 1
    online: Annotated[bool, "the teacher learns too; off: it is trained already, and frozen"] = True

    def divergences(self) -> tuple[RowDivergence, RowDivergence]:
        """Of a student to its peers, and of the teacher to the students."""
        if self.exchange == "dml":
            return ForwardKL(temperature=self.temperature), ForwardKL(temperature=self.temperature)
        return EntropyBalancedKL(nu=self.nu, temperature=self.temperature), ReverseKL(temperature=self.temperature)

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=not self.online)
        teacher = Observed(task.new_teacher(), name="teacher") if self.online else task.observed_teacher()
        names = ["student", *(f"student-{number}" for number in range(2, self.students + 1))]
        students = [Observed(task.new_student(offset), name=name) for offset, name in enumerate(names)]
        of_students, of_teacher = self.divergences()
        match = partial(with_peers, weight=self.weight)
        players: list[Player] = []
        for student in students:
            peers = [teacher, *(other for other in students if other is not student)]
            objective = match(student.output("logits"), [p.output("logits") for p in peers], of_students)
            players.append(task.player(student.name, student, objective))
        if self.online:
            objective = match(teacher.output("logits"), [s.output("logits") for s in students], of_teacher)
            players.append(task.player("teacher", teacher, objective))
        models = yield from task.together("student", players)
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "bd-kd": {"baseline": False},
            "mutual learning": {"exchange": "dml", "baseline": False},
            "labels alone": {"weight": 0.0, "baseline": False},
        }
        claim = Experiment("bd-kd", arms, "equal steps, batches and initial weights of both networks").claim
        on = "on noisy test digits"
        accuracy = f"the student's accuracy {on}", "student/accuracy"
        return [
            claim(
                "balanced divergences give a more accurate student than mutual learning",
                *accuracy,
                "bd-kd",
                "mutual learning",
            ),
            claim(
                "and a better calibrated one",
                f"the student's expected calibration error {on}, 15 bins",
                "student/ece",
                "bd-kd",
                "mutual learning",
                higher_is_better=False,
            ),
            claim(
                "the student is more accurate than one that learns from the labels alone",
                *accuracy,
                "bd-kd",
                "labels alone",
                scope="consequence",
            ),
            claim(
                "its confidence comes nearer to the teacher's than that of two networks that learn apart",
                f"difference of the mean entropies of student and teacher {on}, nats",
                lambda figures: abs(figures["student/entropy"] - figures["teacher/entropy"]),
                "bd-kd",
                "labels alone",
                higher_is_better=False,
                scope="consequence",
            ),
        ]
