"""A few labelled images, many without labels, and what a teacher may be asked about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.source import Source
from stillhouse.core.train import Train
from stillhouse.data.crops import mix_images
from stillhouse.data.images import Images, in_turn, random_shift, subset
from stillhouse.data.partly_labelled import ClassGaussians, PartlyLabelled
from stillhouse.data.sources import Augmented, Change, Drawn
from stillhouse.objectives.elicitation import RankedGuesses, Ranking
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.tasks.vision import VisionSystem, VisionTask

Inputs = Literal["given", "expanded", "curated"]
APART = 700_001  # what is written draws other numbers than the augmentation


@dataclass(kw_only=True)
class SeededSystem(VisionSystem):
    """Fields of every system that begins with a few labels and asks for more."""

    labelled: Annotated[int, "seeds: training images whose labels are known, drawn by the seed", Ge(1)] = 100
    pool: Annotated[Literal["all", "seeds"], "inputs to ask about, without labels: all training images or seeds"] = (
        "all"
    )
    seed_epochs: Annotated[float, "passes over the seeds before anybody is asked", Gt(0)] = 60.0
    expansion: Annotated[Literal["mixup", "shift", "both"], "how new inputs are made from given ones"] = "both"
    shrinkage: Annotated[float, "curation: share of the classes' spread that is even over pixels", Ge(0), Le(1)] = 0.1

    demo: ClassVar[dict[str, Any]] = {
        **VisionSystem.demo,
        "student": "scale:0.1",
        "batch_size": 32,
        "epochs": 20.0,
        "baseline": False,
    }
    smoke: ClassVar[dict[str, Any]] = {**VisionSystem.smoke, "labelled": 40, "batch_size": 16}


@dataclass(frozen=True)
class Seeds:
    """The seeds of a task, the pool beside them, and stages that train on both.

    Attributes:
        labelled: the images whose labels are known.
        pool: images whose labels nobody reads; the seeds among them.
    """

    system: SeededSystem
    task: VisionTask
    labelled: Images
    pool: Images

    @staticmethod
    def of(system: SeededSystem, task: VisionTask, *, pool: Literal["all", "seeds"]) -> Seeds:
        """Some of the training images, drawn by the run's seed; the pool is all of them, or the seeds again."""
        labelled = subset(task.images, system.labelled, seed=system.seed)
        return Seeds(system, task, labelled, task.images if pool == "all" else labelled)

    def first(self, name: str) -> Train:
        """The stage in which a student learns the seeds, before anybody is asked anything."""
        steps = self.system.steps or self.task.steps_of(self.system.seed_epochs, self.labelled)
        return self.task.train(name, self.task.cross_entropy, images=self.labelled, steps=steps)

    def inputs(self, kind: Inputs) -> Source:
        """Images without labels: the pool's, new ones made from it, or new ones from what is known of the classes."""
        system = self.system
        if kind == "curated":
            known, count = ClassGaussians(self.labelled, shrinkage=system.shrinkage), system.batch_size
            return Drawn(lambda generator: known.draw(count, generator), seed=system.seed + APART)
        source = self.task.source(self.pool, seed=system.seed + 1)
        if kind == "given":
            return source
        mixed = unlabelled(mix_images(len(self.task.classes), mixup=1.0, cutmix=0.0))
        changes: dict[str, list[Change]] = {
            "mixup": [mixed],
            "shift": [random_shift(1)],
            "both": [random_shift(1), mixed],
        }
        return Augmented(source, in_turn(changes[system.expansion]), seed=system.seed + APART)

    def train(
        self, name: str, start: Artifact, inputs: Source, elicited: Callable[[Observed], Objective] | None
    ) -> Train:
        """The stage that trains a student on the seeds' labels and on what is elicited; it begins as ``start``."""

        def objective(student: Observed) -> Objective:
            labels = CrossEntropy(student.output("logits"))
            return labels if elicited is None else labels + elicited(student)

        stage = self.task.train(name, objective, model=self.task.load(start))
        stage.source = PartlyLabelled(self.task.source(self.labelled), inputs)
        return stage

    def frozen(self, model: Artifact, name: str) -> Observed:
        """A model that is only asked."""
        return Observed(self.task.load(model), frozen=True, name=name)

    def feedback(
        self, learner: Observed, first: Observed, *, learn: Ranking | Literal["reward"], guesses: int, beta: float
    ) -> RankedGuesses:
        """The teacher's ranking of guesses: the learner's own, or for a reward model those of the ``first`` student."""
        own, before = learner.output("logits"), first.output("logits")
        teacher = self.task.observed_teacher().output("logits")
        if learn == "reward":
            return RankedGuesses(own, teacher, before, guesses=guesses)
        reference = before if learn == "dpo" else None
        return RankedGuesses(own, teacher, own, ranking=learn, guesses=guesses, beta=beta, reference=reference)


def unlabelled(change: Change) -> Change:
    """A change that mixes labels too, for images whose labels nobody knows."""

    def changed(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        hidden = {**batch, "labels": torch.zeros_like(batch["labels"])}
        return {"pixel_values": change(hidden, generator)["pixel_values"]}

    return changed
