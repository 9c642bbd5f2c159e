"""BiStil: a small bilingual encoder out of a multilingual one, for zero-shot transfer between its two languages."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.models.sparse_masks import SparseDifference
from stillhouse.models.text_classifier import load_text_classifier
from stillhouse.tasks.bilingual import BilingualTask, Lottery, begin, read_ids
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.text_classification import TextClassificationSystem


@dataclass(kw_only=True)
class BiStil(TextClassificationSystem):
    """Bilingual distillation of multilingual encoders (Ansell et al., 2023, arXiv 2306.01709).

    The student keeps every n-th layer and the tokens its languages use, and may be narrower. On text of both in turn it
    matches the teacher adapted to each; then it learns the task in the source language as a sparse difference, from a
    tuned teacher.
    """

    meta = Meta(
        card=65,
        title="BiStil",
        domain="language",
        family="vocabulary trimming, layer reduction, attention, hidden and logit KD, sparse fine-tuning",
        citation="Ansell et al. (2023), Distilling Efficient Language-Specific Models for Cross-Lingual Transfer, "
        "Findings of ACL 2023, arXiv 2306.01709",
        feedback=("features", "relations", "logits"),
        granularity=("token", "sequence", "model"),
        elicitation="feature",
        algorithm=("similarity", "divergence", "pruning"),
        knowledge=("feature", "relation", "response"),
        stages="sparse differences of languages and task, trimming, general phase, task phase",
        role="smaller models",
        skill="understanding",
    )
    demo: ClassVar = {
        **TextClassificationSystem.demo,
        "train_size": 300,
        "batch_size": 16,
        "demo_steps": 800,
        "density": 0.3,  # 8 % of so small an encoder hold no task
        **{"language_steps": (20, 20), "language_lr": 1e-3},
        "teacher_steps": (80, 120),
        **{"general_steps": 300, "general_lr": 2e-3},
        "task_steps": (60, 90),
        "lr": 3e-3,
    }
    smoke: ClassVar = {
        **TextClassificationSystem.smoke,
        **{"language_steps": (2, 2), "teacher_steps": (3, 3), "general_steps": 12, "task_steps": (3, 12)},
    }

    texts: Annotated[
        tuple[str, ...], "unlabelled text of the source language, of the target language, and of more if wished"
    ] = ("demo:0", "demo:3")
    target_data: Annotated[str, "labelled text of the target language, to measure on"] = "demo"
    reduction: Annotated[int, "the teacher's layers for one of the student's", Ge(1)] = 2
    hidden_factor: Annotated[int, "the teacher's width and feed-forward size for 1 of the student's", Ge(1)] = 1
    layers: Annotated[Literal["regular", "bottom"], "layers kept: every n-th, or the lowest"] = "regular"
    threshold: Annotated[float, "least probability of a kept token in one of the texts", Ge(0), Le(1)] = 1e-6
    density: Annotated[float, "share of the encoder's parameters that a sparse difference changes", Gt(0), Le(1)] = 0.08
    freeze_norms: Annotated[bool, "leave layer norms out of sparse fine-tuning"] = False
    adapt: Annotated[bool, "adapt the teacher to each language by a sparse difference"] = True
    language_steps: Annotated[tuple[int, int], "steps of a language's difference: full, sparse"] = (25_000, 25_000)
    language_lr: Annotated[float, "their learning rate", Gt(0)] = 5e-5
    teacher_steps: Annotated[tuple[int, int], "steps of the teacher's task difference: full, sparse"] = (5_000, 5_000)
    general: Annotated[Literal["distil", "scratch"], "the general phase; scratch: without a teacher"] = "distil"
    general_steps: Annotated[int, "steps of the general phase", Ge(1)] = 200_000
    general_lr: Annotated[float, "its learning rate", Gt(0)] = 1e-4
    task_steps: Annotated[tuple[int, int], "steps of the student's task difference: full, sparse"] = (5_000, 5_000)
    temperature: Annotated[float, "of the soft labels; losses are not scaled by its square", Gt(0)] = 2.0
    lr: Annotated[float, "learning rate of the task phases", Gt(0)] = 5e-5
    batch_size: Annotated[int, "examples in a micro-batch, all processes together", Ge(1)] = 8
    length: Annotated[int, "tokens of an example at most", Ge(4)] = 256

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        sparse = partial(Lottery, self.density, freeze_norms=self.freeze_norms)
        task = yield from BilingualTask.prepare_languages(self, run, texts=self.texts, target_data=self.target_data)
        languages = sparse(*self.language_steps) if self.adapt else None
        spoken = yield from task.language_differences(languages, lr=self.language_lr)
        own = {"source": spoken[:1], "target": spoken[1:2]}
        teacher = yield from task.lottery(
            "teacher",
            lambda: task.adapted(*own["source"]),
            task.label_loss,
            sparse(*self.teacher_steps),
            source=task.source,
            lr=self.lr,
        )
        size: dict[str, Any] = {"reduction": self.reduction, "hidden_factor": self.hidden_factor, "layers": self.layers}
        start = yield begin(task, spoken, threshold=self.threshold, **size)
        general = yield task.general(start, spoken, self.general, steps=self.general_steps, lr=self.general_lr)
        small = task.small(start)
        tuned = task.reading(load_text_classifier(str(teacher.path)), read_ids(start))
        student = yield from small.lottery(
            "student",
            lambda: small.new_classifier(str(general.path)),
            small.task_objective(tuned, temperature=self.temperature),
            sparse(*self.task_steps),
            source=small.source,
            lr=self.lr,
        )
        learnt = SparseDifference.load(teacher.path)
        models = {"teacher": (task, lambda side: task.composed(teacher, *own[side], learnt))}
        yield task.transfer({**models, "student": (small, lambda _side: small.load(student))})

    def claims(self) -> list[Claim]:
        everything = ("demo:0", "demo:3", "demo:1", "demo:2")
        more: dict[str, Any] = {"all languages": {"texts": everything}, "from scratch": {"general": "scratch"}}
        budget = "300 general and 150 task steps of equal batches; labels in one language; the same teacher"
        claim = partial(
            Experiment("bistil", {"bilingual": {}, **more}, budget).claim,
            metric="accuracy on 1,000 sentences of the target language, of which no label was seen",
            figure="student/target",
            method="bilingual",
        )
        return [
            claim("a bilingual student transfers better than one for all languages", baseline="all languages"),
            claim("a bilingual student transfers better than a bilingual model from scratch", baseline="from scratch"),
        ]
