"""Memorisation audit: what distillation keeps of a teacher's memory, and what could have been told before."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from stillhouse.audits.memorisation import left_out
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.losses.divergences import ForwardKL
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.canaries import canary_task
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.memorisation import continued, extraction, peeled, taught, train_on


@dataclass(kw_only=True)
class Memorisation(LanguageSystem):
    """Memorization dynamics in knowledge distillation for language models (Borkar et al., 2026, arXiv 2601.15394).

    Teacher, baseline (the student's size, on the text) and students (on the teacher's distributions: "soft"; on its
    greedy continuations: "hard") see the same sequences, and are asked for them word for word.
    """

    meta = Meta(
        card=160,
        title="Memorisation audit",
        domain="language",
        family="audit, privacy",
        citation="Borkar, Chadha, Mireshghallah, Zhang, Veliche, Mitra, Smith, Xu and Garcia-Olano (2026), "
        "Memorization Dynamics in Knowledge Distillation for Language Models, arXiv 2601.15394",
        feedback=("logits", "traces"),
        granularity="sequence",
        algorithm=("divergence", "supervised fine-tuning"),
        stages=6,
        role="smaller models",
    )
    demo: ClassVar = {
        **LanguageSystem.demo,
        "window": 17,
        "prefix": 8,
        "suffix": 8,
        "batch_size": 50,
        "teacher_epochs": 12.0,
        "epochs": 50.0,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "keep": "last",
    }
    smoke: ClassVar = {"prefix": 6, "suffix": 4, "repeats": 3, "filtered": True, "onion": 1}

    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 256
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 5e-5
    epochs: Annotated[float, "passes of the baseline and the students over the data", Gt(0)] = 4.0
    teacher_epochs: Annotated[float, "passes of the teacher over the data first; 0: it is ready", Ge(0)] = 3.0
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    learns: Annotated[Literal["soft", "hard", "text"], "from what; text: as the baseline, in another order"] = "soft"
    also: Annotated[Literal["none", "soft", "hard"], "a further student"] = "hard"
    prefix: Annotated[int, "tokens a model is given", Ge(1)] = 50
    suffix: Annotated[int, "tokens it must give back", Ge(1)] = 50
    repeats: Annotated[int, "splits the risk predictor is tested on", Ge(1)] = 100
    filtered: Annotated[bool, "also train a student without the sequences at risk"] = False
    onion: Annotated[int, "layers of what is most exposed to take away, with a new student after each", Ge(0)] = 0
    layer: Annotated[float, "share of the memorised sequences in a layer", Gt(0), Le(1)] = 0.5

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from canary_task(self, run) if self.is_demo() else LanguageTask.prepare(self, run)
        sequences = task.windows.train[:]["input_ids"]
        if self.teacher_epochs:
            task.teacher = yield from taught(task, self.teacher_epochs)
        models = {"baseline": (yield task.baseline())}
        hard: Tensor | None = None
        for name, way in {"student": self.learns, self.also: self.also}.items():
            if way == "hard" and hard is None:
                hard = yield from continued(task, sequences, self.prefix)
            if way != "none":
                models[name] = yield self._student(task, name, way, hard)
        yield task.evaluation(models)
        lengths: dict[str, Any] = {"prefix": self.prefix, "suffix": self.suffix}
        audit = partial(extraction, task, sequences, prefix=self.prefix, suffix=self.suffix, repeats=self.repeats)
        found = yield audit("audit", models)
        if self.filtered:
            kept = ~left_out(found, seed=self.seed)
            cleaned = models | {"filtered": (yield self._student(task, "filtered", self.learns, hard, kept))}
            yield audit("audit-filtered", cleaned)
        if self.onion:
            anew = partial(self._student, task, way=self.learns, hard=hard)
            yield from peeled(task, sequences, models["student"], anew, self.onion, self.layer, **lengths)

    def _student(
        self, task: LanguageTask, name: str, way: str, hard: Tensor | None, kept: Tensor | None = None
    ) -> Train:
        objective = partial(self._soft, task) if way == "soft" else task.cross_entropy
        if way == "soft" and kept is None:
            return task.train(name, objective)
        data = hard if hard is not None and way == "hard" else task.windows.train[:]["input_ids"]
        data = data if kept is None else data[kept]
        return train_on(task, name, objective, data.flip(0) if way == "text" else data)

    def _soft(self, task: LanguageTask, student: Observed) -> Objective:
        teacher, divergence = head_of(task.observed_teacher()), ForwardKL(temperature=self.temperature)
        return TokenMatch(head_of(student), teacher, divergence, vocab_size=task.vocab_size)

    def claims(self) -> list[Claim]:
        arms = {way: {"learns": way, "also": "none", "repeats": 10} for way in ("soft", "text")}
        trained = Experiment("memorisation", arms, "equal pre-trained students, steps and learning rates")
        less: dict[str, Any] = {"method": "soft", "baseline": "text", "higher_is_better": False}
        return [
            replace(trained, stage="audit").claim(
                "a student trained on the teacher's distributions memorises less of the training text than one "
                "of its size trained on the text",
                *("share of training sequences given back word for word", "student/memorised"),
                **less,
            ),
            trained.claim(
                "and it predicts held-out text better",
                *("loss on held-out text, nats per token", "student/val_loss"),
                **less,
            ),
        ]
