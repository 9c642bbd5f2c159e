"""MEND: demonstrations distilled into vectors that a frozen model reads instead."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.in_context import as_with_demonstrations
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.in_context import InContextSystem, InContextTask


@dataclass(kw_only=True)
class MEND(InContextSystem):
    """Meta demonstration distillation (Li et al., ICLR 2024, arXiv 2403.06914).

    A small language model reads the demonstrations of a task once and gives ``vectors`` that stand before a question
    in a large, frozen one. It learns that the large one says with them what it says with the demonstrations: first on
    text cut in two, by the KL alone; then on many tasks, by the cross-entropy of the answer + ``kl`` KL. Nothing is
    trained for a new task.
    """

    meta = Meta(
        card=25,
        title="MEND",
        domain="language",
        family="context distillation into vectors, hyper-network",
        citation="Li et al. (2024), MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context "
        "Learning, ICLR 2024, arXiv 2403.06914",
        feedback=("logits", "labels"),
        elicitation="feature",
        algorithm=("divergence", "supervised fine-tuning"),
        skill="instruction following",
        role="compression",
        stages=2,
    )
    demo: ClassVar = {
        **InContextSystem.demo,
        "vectors": 4,
        "pretrain_steps": 200,
        "pretrain_lr": 1e-3,
        "steps": 400,
        "lr": 1e-3,
    }
    smoke: ClassVar = {"reader_steps": 20, "pretrain_steps": 12, "steps": 12, "queries": 2, "batch_size": 4}

    vectors: Annotated[int, "vectors that stand for the demonstrations", Ge(1)] = 100
    chunks: Annotated[int, "demonstrations are read in so many parts, each giving its own vectors", Ge(1)] = 1
    ratio: Annotated[float, "first stage: share of a text that plays the demonstrations", Gt(0), Lt(1)] = 0.8
    pretrain_steps: Annotated[int, "optimizer steps of the first stage; 0 leaves it out", Ge(0)] = 30_000
    pretrain_lr: Annotated[float, "peak learning rate of the first stage", Gt(0)] = 5e-5
    steps: Annotated[int, "optimizer steps of the second stage", Ge(1)] = 30_000
    lr: Annotated[float, "peak learning rate of the second stage", Gt(0)] = 1e-5
    kl: Annotated[float, "second stage: weight of the KL beside the answers' cross-entropy", Ge(0)] = 1.0
    temperature: Annotated[float, "softens both distributions of the KL", Gt(0)] = 1.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from InContextTask.prepare(self, run)
        distiller = task.new_distiller(vectors=self.vectors, chunks=self.chunks)

        def objective(observed: Observed, *, labels: float, kl: float) -> Objective:
            return as_with_demonstrations(observed, task.lm, labels=labels, kl=kl, temperature=self.temperature)

        if self.pretrain_steps:
            first = yield task.train_distiller(
                "pretrained",
                distiller,
                partial(objective, labels=0.0, kl=1.0),
                source=task.cut_text(self.ratio, vectors=self.vectors * self.chunks),
                steps=self.pretrain_steps,
                lr=self.pretrain_lr,
            )
            distiller = task.load(first)
        trained = yield task.train_distiller(
            "student",
            distiller,
            partial(objective, labels=1.0, kl=self.kl),
            source=task.episodes(),
            steps=self.steps,
            lr=self.lr,
        )
        yield task.evaluation(trained)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "mend": {},
            "no demonstrations": {"demos": 0},
            "without KL": {"kl": 0.0},
            "without stage 1": {"pretrain_steps": 0, "steps": 600},
            "one vector": {"vectors": 1},
        }
        budget = "equal updates in both stages together, batches and initial weights"
        claim = Experiment("mend", arms, budget).claim
        accuracy = "accuracy on maps never trained on", "distilled/accuracy"
        also = partial(claim, scope="consequence")
        return [
            claim(
                "vectors made of demonstrations teach a frozen model a task that nothing was trained on",
                *accuracy,
                "mend",
                "no demonstrations",
            ),
            claim("the KL to the model with the demonstrations helps", *accuracy, "mend", "without KL"),
            claim("so does the first stage, for a third of the updates", *accuracy, "mend", "without stage 1"),
            also("four vectors hold more than one", *accuracy, "mend", "one vector"),
        ]
