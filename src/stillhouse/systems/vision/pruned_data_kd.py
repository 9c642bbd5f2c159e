"""KD on pruned data: a teacher that has seen all of the data teaches a student that sees a part of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.data.images import Images
from stillhouse.data.pruning_scores import kept_positions
from stillhouse.objectives.logits import CrossEntropy, KLDivergence
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.vision import VisionTask
from stillhouse.tasks.vision_pruning import (
    PruningFields,
    Share,
    best_of,
    over_fractions,
    scores_of_all,
    steps_on,
    teacher_of_all,
)


@dataclass(kw_only=True)
class PrunedDataKD(PruningFields):
    """Distilling the knowledge in data pruning (Ben-Baruch et al., ICML 2025, arXiv 2403.07854).

    The student minimises (1 - alpha) cross-entropy + alpha T^2 KL(teacher || student) on the share ``fraction`` of the
    images; the teacher, by default of its own architecture, was trained on all of them. The smaller the share, the
    larger alpha: by a straight line, or by what is best on the selection images.
    """

    meta = Meta(
        card=100,
        title="KD on pruned data",
        domain="vision",
        family="logit KD, data pruning",
        citation="Ben-Baruch et al. (2025), Distilling the Knowledge in Data Pruning, ICML 2025, arXiv 2403.07854",
        feedback=("logits", "labels"),
        granularity="sample",
        elicitation="curation",
        algorithm=("divergence", "pruning"),
        modality="image",
        stages="3 to many",
        role="smaller models",
    )
    demo: ClassVar = {
        **PruningFields.demo,
        "label_noise": 0.1,  # for scores to trip over; what is measured on is right
        "epochs": 20.0,
        "cost": "steps",
        "sweep": [0.05, 0.3, 1.0],
        "probes": 3,
        "probe_epochs": 3.0,
        "feature_epochs": 10.0,
    }

    temperature: Annotated[float, "softens both distributions", Gt(0)] = 4.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=False)
        task.teacher = yield from teacher_of_all(self, task)
        scores = yield from scores_of_all(self, task, task.teacher)
        models: dict[str, Artifact] = {}
        shares: list[Share] = []
        for fraction in dict.fromkeys([self.fraction, *self.sweep]):
            mark = "" if fraction == self.fraction else f"-{fraction:g}"
            chosen = kept_positions(scores, task.images.labels, fraction, balanced=self.balanced)
            train = partial(self.train, task, task.images.select(chosen))
            found = yield from best_of(task, f"student{mark}", self.alphas(fraction), train)
            models[f"student{mark}"], alpha = found
            if self.baseline:
                models[f"baseline{mark}"] = yield train(f"baseline{mark}", 0.0)
            shares.append(Share(fraction, len(chosen), alpha, mark))
        evaluated = yield task.evaluation(models)
        yield over_fractions(shares, evaluated)

    def train(self, task: VisionTask, images: Images, name: str, alpha: float) -> Train:
        """The stage that trains a student on these images."""
        teacher = task.observed_teacher().output("logits")

        def objective(student: Observed) -> Objective:
            logits = student.output("logits")
            match = KLDivergence(logits, teacher, temperature=self.temperature)
            return (1 - alpha) * CrossEntropy(logits) + alpha * match if alpha else CrossEntropy(logits)

        return task.train(name, objective, images=images, steps=steps_on(self, task, images))

    def claims(self) -> list[Claim]:
        few: dict[str, Any] = {"sweep": [], "fraction": 0.1, "baseline": False}
        grid: dict[str, Any] = {**few, "alpha_by": "validation", "alpha_grid": [0.0, 0.5, 1.0]}
        arms: dict[str, dict[str, Any]] = {
            "random": few,
            "random, labels alone": {**few, "alpha": 0.0},
            "el2n": {**few, "selector": "el2n"},
            "el2n, labels alone": {**few, "selector": "el2n", "alpha": 0.0},
            "forgetting": {**few, "selector": "forgetting"},
            "alpha at 0.05": {**grid, "fraction": 0.05},
            "alpha at 1": {**grid, "fraction": 1.0},
        }
        experiment = Experiment("pruned-data-kd", arms, "equal steps, batch sizes and initial weights")
        claim, more = experiment.claim, "with a tenth of the data, a teacher of all of it makes a better student"
        accuracy = "accuracy on test digits, whose labels are right", "student/accuracy"
        chance = "with a tenth of the data and a teacher of all of it, a random choice is better than"
        return [
            claim(f"{more} (chosen at random)", *accuracy, "random", "random, labels alone"),
            claim(f"{more} (chosen by EL2N)", *accuracy, "el2n", "el2n, labels alone"),
            claim(f"{chance} EL2N's", *accuracy, "random", "el2n"),
            claim(f"{chance} what is forgotten most", *accuracy, "random", "forgetting"),
            replace(experiment, stage="fractions").claim(
                "the less data, the larger the weight of the teacher that is best on the selection images",
                "the best of the weights 0, 0.5 and 1",
                "alpha",
                "alpha at 0.05",
                "alpha at 1",
                scope="consequence",
            ),
        ]
