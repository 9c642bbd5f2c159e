"""Knowledge distillation as first published, for language models."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import ForwardKL
from stillhouse.objectives.cached import CachedTokenMatch
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.language_cache import teacher_from_cache
from stillhouse.teachers.cache import Numbered


@dataclass(kw_only=True)
class KD(LanguageSystem):
    """Distilling the knowledge in a neural network (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531).

    alpha * T^2 KL(teacher_T || student_T) + (1 - alpha) * cross-entropy, token by token on the text.
    """

    meta = Meta(
        title="Knowledge distillation",
        domain="language",
        family="logit KD",
        citation="Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, arXiv 1503.02531",
        feedback="logits",
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
        facts=MethodFacts(drawing="nothing drawn", divergence=("forward-kl",), own_text=0.0, sampler="data"),
    )
    demo: ClassVar = {**LanguageSystem.demo, "temperature": 1.0}

    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    alpha: Annotated[float, "weight of the teacher; the labels get the rest", Ge(0), Le(1)] = 0.9
    teacher_topk: Annotated[
        int | None, "ask the teacher once, keep its likeliest tokens on disk, and learn from these", Ge(1)
    ] = None

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        divergence = ForwardKL(temperature=self.temperature)
        weights: dict[str, Any] = {"divergence_weight": self.alpha, "cross_entropy": 1 - self.alpha}
        if self.teacher_topk is None:
            teacher = head_of(task.observed_teacher())
            stage = task.train(
                "student",
                lambda student: TokenMatch(
                    head_of(student), teacher, divergence, vocab_size=task.vocab_size, **weights
                ),
            )
        else:
            kept = yield from teacher_from_cache(task, k=self.teacher_topk)
            whole = self.teacher_topk >= task.vocab_size
            stage = task.train(
                "student",
                lambda student: CachedTokenMatch(
                    head_of(student), kept, divergence, whole=whole, vocab_size=task.vocab_size, **weights
                ),
            )
            stage.source.data = Numbered(stage.source.data)
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        return [
            Claim(
                statement="a student trained on the teacher's distributions and the text predicts held-out text better "
                "than the same student trained on the text alone",
                metric="validation loss, nats per token",
                method="kd",
                baseline="sft",
                variants={"kd": ("kd", {"epochs": 3.0, "baseline": False}), "sft": ("sft", {"epochs": 3.0})},
                measure=lambda artifacts: artifacts["evaluation"].metrics["student/val_loss"],
                higher_is_better=False,
                seeds=3,
                budget="equal steps, batches and initial weights",
            )
        ]
