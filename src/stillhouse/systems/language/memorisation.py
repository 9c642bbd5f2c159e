"""Memorisation audit: what distillation keeps of a teacher's memory, and what could have been told before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from stillhouse.audits.memorisation import at_risk, greedy_continuations, memorisation_audit
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Generate, Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.data.windows import WindowSplit
from stillhouse.losses.divergences import ForwardKL
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.canaries import canary_task
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class Memorisation(LanguageSystem):
    """Memorization dynamics in knowledge distillation for language models.

    Teacher, baseline (the student's size, on the text) and students (on the teacher's distributions: "soft"; on its
    greedy continuations: "hard") are trained on the same sequences, and asked for them word for word.
    """

    meta = Meta(
        card=160,
        title="Memorisation audit",
        domain="language",
        family="audit, privacy",
        citation="Memorization Dynamics in Knowledge Distillation for Language Models",
        feedback=("logits", "traces"),
        granularity="sequence",
        algorithm=("divergence", "supervised fine-tuning"),
        stages=6,
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
    smoke: ClassVar = {"prefix": 6, "suffix": 4, "repeats": 3, "filtered": True}

    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 256
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 5e-5
    epochs: Annotated[float, "passes of the baseline and the students over the data", Gt(0)] = 4.0
    teacher_epochs: Annotated[float, "passes of the teacher over the data before it teaches; 0: it is ready", Ge(0)] = (
        3.0
    )
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    learns: Annotated[
        Literal["soft", "hard", "text"], "what the student learns from; text: as the baseline, with another order"
    ] = "soft"
    also: Annotated[Literal["none", "soft", "hard"], "a further student"] = "hard"
    prefix: Annotated[int, "tokens a model is given", Ge(1)] = 50
    suffix: Annotated[int, "tokens it must give back", Ge(1)] = 50
    repeats: Annotated[int, "splits the risk predictor is tested on", Ge(1)] = 100
    filtered: Annotated[bool, "also train a student without the sequences at risk"] = False

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from canary_task(self, run) if self.is_demo() else LanguageTask.prepare(self, run)
        sequences = task.windows.train[:]["input_ids"]
        if self.teacher_epochs:
            large = replace(task, new_student=lambda: deepcopy(task.teacher).float().requires_grad_(True))
            steps = self.steps or task.steps_of(self.teacher_epochs)
            taught = yield large.train("teacher", task.cross_entropy, steps=steps)
            task.teacher = task.load(taught)
        models = {"baseline": (yield task.baseline())}
        hard: Tensor | None = None
        for name, way in {"student": self.learns, "also": self.also}.items():
            if way == "hard" and hard is None:
                hard = yield from self._continued(task, sequences)
            if way != "none":
                label = name if name == "student" else way
                models[label] = yield self._student(task, label, way, hard)
        yield task.evaluation(models)
        audit = partial(self._audit, task, sequences)
        found = yield audit("audit", models)
        if self.filtered:
            risky = at_risk(
                np.array(found.json("features.json")), self._memorised(found, len(sequences)), seed=self.seed
            )
            kept = sequences[torch.from_numpy(~risky)]
            cleaned = models | {"filtered": (yield self._student(task, "filtered", self.learns, hard, kept))}
            yield audit("audit-filtered", cleaned)

    def _student(
        self, task: LanguageTask, name: str, way: str, hard: Tensor | None, sequences: Tensor | None = None
    ) -> Train:
        objective = partial(self._soft, task) if way == "soft" else task.cross_entropy
        stage = task.train(name, objective)
        data = hard if way == "hard" and sequences is None else sequences
        if way == "text":
            data = task.windows.train[:]["input_ids"].flip(0)
        if data is not None:
            stage.source = Batches(WindowSplit({"input_ids": data}), self.batch_size, seed=self.seed, gather=True)
        return stage

    def _soft(self, task: LanguageTask, student: Observed) -> Objective:
        teacher = head_of(task.observed_teacher())
        return TokenMatch(
            head_of(student), teacher, ForwardKL(temperature=self.temperature), vocab_size=task.vocab_size
        )

    def _continued(self, task: LanguageTask, sequences: Tensor) -> Generator[Stage, Artifact, Tensor]:
        """The teacher's greedy continuations of all prefixes, each as long as the sequence was."""
        prefix, more = self.prefix, sequences.shape[1] - self.prefix

        def write(left: Mapping[str, list[int]]) -> Iterator[tuple[str, dict[str, list[int]]]]:
            keys = list(left)
            for start in range(0, len(keys), 64):
                part = torch.tensor([left[key] for key in keys[start : start + 64]])
                found = torch.cat([part, greedy_continuations(task.teacher, part, more)], 1)
                yield from zip(keys[start : start + 64], ({"tokens": row} for row in found.tolist()), strict=True)

        requests = {str(number): row for number, row in enumerate(sequences[:, :prefix].tolist())}
        written = yield Generate("continuations", requests, write, together=True)
        return torch.tensor(pq.read_table(written.data_file())["tokens"].to_pylist())

    def _audit(self, task: LanguageTask, sequences: Tensor, name: str, artifacts: dict[str, Artifact]) -> Stage:
        def load() -> Mapping[str, torch.nn.Module]:
            teacher = task.teacher.to(task.run.fabric.device)
            return {"teacher": teacher, **{label: task.load(artifact) for label, artifact in artifacts.items()}}

        texts: Callable[[], list[str]] = partial(task.tokenizer.batch_decode, sequences)
        options = {"prefix": self.prefix, "suffix": self.suffix, "repeats": self.repeats}
        return memorisation_audit(name, load, sequences, texts, **options)

    def _memorised(self, audit: Artifact, count: int) -> np.ndarray:
        return np.isin(np.arange(count), audit.json("memorised.json")["student"]["memorised"])

    def claims(self) -> list[Claim]:
        central = Claim(
            statement="a student trained on the teacher's distributions memorises less of the training text than one "
            "of its size trained on the text",
            metric="share of training sequences given back word for word",
            method="soft",
            baseline="text",
            variants={
                "soft": ("memorisation", {"learns": "soft", "also": "none", "repeats": 10}),
                "text": ("memorisation", {"learns": "text", "also": "none", "repeats": 10}),
            },
            measure=lambda artifacts: artifacts["audit"].metrics["student/memorised"],
            higher_is_better=False,
            seeds=3,
            budget="equal pre-trained students, steps and learning rates",
        )
        loss = replace(
            central,
            statement="and it predicts held-out text better",
            metric="loss on held-out text, nats per token",
            measure=lambda artifacts: artifacts["evaluation"].metrics["student/val_loss"],
        )
        return [central, loss]
