"""Distilling an encoder phase by phase: who teaches, on which text, with which losses.

A phase is a line such as ``gd: pretrained general latent steps=2000 lr=1e-4``.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.labelled import Labelled
from stillhouse.models.text_classifier import load_text_classifier, new_text_classifier, smaller_config
from stillhouse.models.word_replacement import WordReplacer, load_word_model
from stillhouse.objectives.encoders import LatentMatch, SoftTargets
from stillhouse.objectives.regression import SquaredError
from stillhouse.tasks.segments import move_on
from stillhouse.tasks.text_classification import (
    DEMO,
    Examples,
    TextClassificationSystem,
    TextClassificationTask,
    general_text,
)

PROJECTION = "latent-projection.safetensors"
CHOICES = {
    "teacher": ("pretrained", "fine-tuned"),
    "data": ("general", "task"),
    "loss": ("latent", "soft", "hard", "latent+soft", "latent+hard", "soft+hard", "latent+soft+hard"),
}


@dataclass(frozen=True)
class Phase:
    """One phase; ``steps`` are ``epochs`` passes unless given, ``lr`` is the system's unless given."""

    name: str
    teacher: str
    data: str
    loss: str
    epochs: float = 3.0
    steps: int | None = None
    lr: float | None = None

    @property
    def losses(self) -> set[str]:
        return set(self.loss.split("+"))

    def changes(self, other: Phase) -> list[str]:
        """In which of teacher, data and loss another phase differs."""
        return [name for name in CHOICES if getattr(self, name) != getattr(other, name)]

    @staticmethod
    def parse(line: str) -> Phase:
        """From a line; raises `ConfigError` naming what in it is not understood."""
        name, _, rest = line.partition(":")
        words = rest.split()
        chosen, numbers = words[:3], words[3:]
        if not name.strip() or len(chosen) < 3:
            raise ConfigError(f"phase {line!r}: write NAME: TEACHER DATA LOSSES, such as gd: pretrained general latent")
        for (axis, allowed), word in zip(CHOICES.items(), chosen, strict=True):
            if word not in allowed:
                raise ConfigError(f"phase {line!r}: {axis} {word!r}{suggest(word, allowed)}")
        if chosen[1] == "general" and "hard" in chosen[2]:
            raise ConfigError(f"phase {line!r}: general text has no labels; leave hard out, or learn from task text")
        if chosen[0] == "pretrained" and "soft" in chosen[2]:
            raise ConfigError(f"phase {line!r}: a pretrained teacher has no classes to be soft about; use fine-tuned")
        values: dict[str, Any] = {}
        for word in numbers:
            key, _, value = word.partition("=")
            try:
                values[key] = {"epochs": float, "steps": int, "lr": float}[key](value)
            except (KeyError, ValueError) as error:
                raise ConfigError(f"phase {line!r}: {word!r}: write epochs=3, steps=1000 or lr=5e-5") from error
            if values[key] <= 0:
                raise ConfigError(f"phase {line!r}: {word!r}: must be above 0")
        teacher, data, loss = chosen
        return Phase(name.strip(), teacher, data, loss, **values)


@dataclass
class PhasedTask(TextClassificationTask):
    """A `TextClassificationTask` with general text, a student of other sizes, and both teachers."""

    general: Examples = field(default=None)  # type: ignore[assignment]
    augmented: Examples = field(default=None)  # type: ignore[assignment]
    tuned: Any = None

    @staticmethod
    def prepare_phases(
        system: TextClassificationSystem, run: Run, *, corpus: str, augment: int, candidates: int, rate: float
    ) -> Generator[Stage, Artifact, PhasedTask]:
        """The task with its augmented examples; yields the stage that makes them."""
        if (corpus == DEMO) != (system.data == DEMO):
            raise ConfigError(f"corpus={corpus}, data={system.data}: give general text of your own with your own data")
        task = yield from TextClassificationTask.prepare(system, run)
        held = {one.name: getattr(task, one.name) for one in fields(TextClassificationTask)}
        phased = PhasedTask(**held, general=task.pieces(general_text(corpus)), augmented=task.rows)
        if augment:
            made = yield Transform("augmented", partial(phased.augment, augment, candidates, rate))
            phased.augmented = phased.examples(read_labelled(made, task.train))
        return phased

    def augment(self, copies: int, candidates: int, rate: float, context: Context) -> Any:
        """The training examples, and ``copies`` of each with words replaced; the labels stay."""
        import datasets

        model = load_word_model(self.encoder)
        replacer = WordReplacer(model, self.tokenizer, candidates=candidates, rate=rate, length=self.system.length)
        draw = random.Random(context.seed)
        changed = {"first": self.train.first, "second": self.train.second}
        columns: dict[str, list[Any]] = {}
        for name, texts in changed.items():
            if texts is not None:
                columns[name] = [*texts, *(text for one in texts for text in replacer(one, copies, draw))]
        labels = self.train.labels
        columns["label"] = torch.cat([labels, labels.repeat_interleave(copies)]).tolist()
        context.results = {"examples": len(columns["label"])}
        return datasets.Dataset.from_dict(columns)

    def new_student(self, sizes: str) -> Any:
        """A classifier with the teacher's vocabulary, other sizes and random weights; or the one in a directory."""
        if "=" not in sizes:
            return self.new_classifier(sizes)
        return new_text_classifier(smaller_config(self.new_classifier().config, sizes), seed=self.system.seed + 1)

    def teacher(self, phase: Phase) -> Observed:
        """The teacher of a phase, frozen."""
        model = load_text_classifier(str(self.tuned)) if phase.teacher == "fine-tuned" else self.new_classifier()
        return Observed(model, frozen=True, name="teacher")

    def distil(
        self, phase: Phase, student: Any, before: Artifact | None, *, drawn: int, last: bool, temperature: float
    ) -> Train:
        """A stage of one phase on ``student``; the map of the latent loss goes on from the phase ``before``.

        ``drawn``: batches that earlier phases have drawn from this phase's text, which it goes on from.
        """
        teacher = self.teacher(phase)
        latent: list[LatentMatch] = []

        def objective(observed: Observed) -> Objective:
            terms: list[Objective] = []
            if "latent" in phase.losses:
                torch.manual_seed(self.system.seed)
                latent.append(LatentMatch(observed, teacher, name="Latent"))
                if before is not None and (before.path / PROJECTION).exists():
                    latent[0].projection.load_state_dict(load_file(before.path / PROJECTION))
                terms.append(latent[0])
            if "soft" in phase.losses:
                outputs = observed.output("logits"), teacher.output("logits")
                soft = SoftTargets(*outputs, temperature=temperature) if self.classes else SquaredError(*outputs)
                terms.append(soft.named("Soft"))
            if "hard" in phase.losses:
                terms.append(self.label_loss(observed).named("Hard"))
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return total

        def save(model: Any, folder: Path) -> None:
            self.save(model, folder)
            if latent and not last:  # dropped with the last phase
                save_file(latent[0].projection.state_dict(), folder / PROJECTION)

        rows = self.general if phase.data == "general" else self.augmented
        source = self.source(rows)
        move_on(source, drawn)
        stage = self.finetune(
            "student" if last else phase.name,
            student,
            objective,
            steps=phase.steps or self.steps_of(phase.epochs, len(rows)),
            lr=phase.lr,
            source=source,
        )
        stage.save = save
        return stage

    def through(
        self, phases: Sequence[Phase], sizes: str, *, temperature: float
    ) -> Generator[Stage, Artifact, Artifact]:
        """All phases in order, each from the weights of the one before with a fresh optimiser; returns the student.

        Phases on the same text go through it one after the other: what one has read, the next one does not begin with.
        """
        student, before, drawn = self.new_student(sizes), None, dict.fromkeys(CHOICES["data"], 0)
        for phase in phases:
            options: dict[str, Any] = {"drawn": drawn[phase.data], "last": phase is phases[-1]}
            stage = self.distil(phase, student, before, temperature=temperature, **options)
            drawn[phase.data] += stage.steps * stage.accumulate
            before = yield stage
            student = load_text_classifier(str(before.path))
        assert before is not None
        return before


def parse_phases(lines: Sequence[str], skip: Sequence[str]) -> list[Phase]:
    """The phases of a plan without those to skip; raises `ConfigError` for names that are not there or twice."""
    phases = [Phase.parse(line) for line in lines]
    names = [phase.name for phase in phases]
    for name in skip:
        if name not in names:
            raise ConfigError(f"skip: no phase {name!r}{suggest(name, names)}")
    left = [phase for phase in phases if phase.name not in skip]
    if not left or len(set(names)) < len(names):
        raise ConfigError(f"phases {', '.join(names)}: give at least one, each with a name of its own")
    return left


def read_labelled(artifact: Artifact, like: Labelled) -> Labelled:
    """Labelled text that a stage left, of the same classes as ``like``."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(artifact.data_file()))
    second = list(rows["second"]) if "second" in rows.column_names else None
    labels = torch.tensor(rows["label"][:], dtype=like.labels.dtype)
    return replace(like, first=list(rows["first"]), second=second, labels=labels)
