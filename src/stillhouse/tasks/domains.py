"""The language task by domain: text, perplexities and what is read of each, embedded or the user's own.

The embedded domains are those of `toy_domains`; a small teacher reads as much of each of them. Suffix: D domains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.domain_mixture import DomainMixture
from stillhouse.data.domains import load_domains
from stillhouse.data.encoding import digest
from stillhouse.data.text import TextData
from stillhouse.data.toy_domains import CHARACTERS, ToyDomains, toy_domains
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.metrics.sequence_loss import mean_loss, perplexity
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.character_tokenizer import character_tokenizer
from stillhouse.models.packing import check_packing
from stillhouse.objectives.domain_weights import ExcessWeightedLoss
from stillhouse.objectives.language import head_of
from stillhouse.tasks.embedded_lm import reader, small_llama
from stillhouse.tasks.language import (
    DEMO,
    LanguageSystem,
    LanguageTask,
    endpoint_of,
    student_builder,
    windows_of,
)
from stillhouse.tasks.selection_pictures import course_picture

COURSE = "domains.json"  # beside a student: the weights it was trained with, and what it had learnt by then
WEIGHTS = "weights.json"  # beside DoReMi's proxy: the mean of the weights it was trained with
MOST_RATIO = 1e6


@dataclass(kw_only=True)
class DomainSystem(LanguageSystem):
    """Fields of every system that distils over several domains."""

    data: Annotated[
        str,
        "folder with a sub-folder or file for each domain; NAME=SOURCE,NAME=SOURCE; with domain_field any file, folder "
        "or hub data set; or 'demo'",
    ] = DEMO
    domain_field: Annotated[str | None, "column that names the domain of a record"] = None
    doremi_step: Annotated[float, "mixture=doremi: step size of the weights", Gt(0)] = 1.0
    doremi_smoothing: Annotated[float, "mixture=doremi: share that is spread evenly", Ge(0), Le(1)] = 1e-3

    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "student": "layers=1,hidden_size=32,heads=2,intermediate_size=64",
        "window": 32,
        "batch_size": 64,
        "lr": 3e-3,
        "validation": 0.2,
        "selection": 0.1,
        "keep": "last",
        "baseline": False,
    }


@dataclass
class DomainTask:
    """A language task whose text is sorted by domain; what `task` holds is all of it together."""

    task: LanguageTask
    names: list[str]
    parts: list[Windows]

    @staticmethod
    def prepare(system: DomainSystem, run: Run) -> Generator[Stage, Artifact, DomainTask]:
        """Build the task; on the embedded domains this yields the stage that trains the teacher."""
        import datasets

        if endpoint_of(system.teacher):
            raise ConfigError(
                f"teacher={system.teacher}: {system.name()} needs its weights; give a directory or hub id"
            )
        if system.teacher == DEMO:
            if system.data != DEMO:
                raise ConfigError("teacher=demo knows data=demo alone; for your own data pass your own teacher")
            texts = _as_data(toy_domains())
            teacher, tokenizer = yield from _demo_teacher(system)
        else:
            texts = _as_data(toy_domains()) if system.data == DEMO else _own_domains(system)
            teacher, tokenizer = load_causal_lm(system.teacher, trust_remote_code=system.trust_remote_code)
        if system.packing:
            check_packing(teacher)
        names = list(texts)
        parts = [windows_of(system, text, tokenizer) for text in texts.values()]
        whole = _together(parts, system.data)
        everything = datasets.concatenate_datasets([text.documents for text in texts.values()])
        data = TextData(everything, parts[0].kind, system.data, whole.fingerprint)
        new_student, vocab_size = student_builder(system, teacher, tokenizer)
        task = LanguageTask(system, run, teacher, tokenizer, data, whole, vocab_size, new_student)
        if system.pretrain:
            steps = task.steps_of(system.pretrain)
            begun = yield task.train("pretrain", task.cross_entropy, steps=steps, adapters=False)
            task.begin_as(begun)
        return DomainTask(task, names, parts)

    @property
    def sizes(self) -> list[float]:
        """Training windows of each domain: the mixture as the data has it."""
        return [float(len(part.train)) for part in self.parts]

    def perplexities(self, model: nn.Module, most: int | None = None, *, final: bool = False) -> list[float]:
        """The model's perplexity on text of every domain: that to choose by, or the one for the final table.

        ``most``: windows of each that are read.
        """
        return [
            perplexity(
                mean_loss(
                    model,
                    self.task.batches_of(part.validation if final else part.selection, most),
                    vocab_size=self.task.vocab_size,
                )
            )
            for part in self.parts
        ]

    def teacher_perplexities(self, most: int) -> Transform:
        """The stage that measures the teacher, once."""

        def measure(context: Context) -> list[float]:
            teacher = self.task.teacher.to(self.task.run.fabric.device)
            found = self.perplexities(teacher, most)
            context.results = dict(zip(self.names, found, strict=True))
            return found

        return Transform("teacher-perplexities", measure)

    def mixture(
        self,
        weights: Sequence[float],
        student: Observed,
        *,
        every: int,
        most: int,
        rule: Callable[[Sequence[float] | None, Sequence[float]], list[float]] | None,
    ) -> DomainMixture:
        """Batches drawn with ``weights``, and by ``rule`` from the first ``every`` optimizer steps on."""
        system = self.task.system
        return DomainMixture(
            [part.train for part in self.parts],
            system.batch_size,
            weights,
            every=every * system.accumulate,
            look=None if rule is None else partial(self.perplexities, student.module, most),
            rule=rule,
            seed=system.seed,
        )

    def doremi(self) -> Generator[Stage, Artifact, list[float]]:
        """The shares that DoReMi (Xie et al., 2023, arXiv 2305.10429) gives the domains, for any student.

        Two more models of the student's kind are trained on the text alone, as long as it is: a reference on the data's
        own mixture, and a proxy on as much of each domain, whose loss weighs domains by its excess over the reference
        (`ExcessWeightedLoss`). The mean of the proxy's weights is the mixture.
        """
        task, system = self.task, self.task.system
        assert isinstance(system, DomainSystem)

        def fixed(shares: Sequence[float]) -> Callable[[Observed], DomainMixture]:
            return lambda student: self.mixture(shares, student, every=1, most=1, rule=None)

        read = yield task.train("reference", task.cross_entropy, source=fixed(self.sizes))
        reference = head_of(Observed(task.load(read), frozen=True, name="reference", options={"use_cache": False}))
        made: list[ExcessWeightedLoss] = []

        def objective(proxy: Observed) -> Objective:
            options: dict[str, Any] = {"step": system.doremi_step, "smoothing": system.doremi_smoothing}
            options |= {"domains": len(self.names), "vocab_size": task.vocab_size}
            made.append(ExcessWeightedLoss(head_of(proxy), reference, **options))
            return made[0]

        stage = task.train("proxy", objective, source=fixed([1.0] * len(self.names)))
        save, evaluate = stage.save or task.save, stage.evaluate

        def both(model: Any, folder: Path) -> None:
            save(model, folder)
            (folder / WEIGHTS).write_text(json.dumps(made[0].mean_weights), encoding="utf-8")

        def figures() -> Mapping[str, float]:
            weights = {f"weight of {name}": w for name, w in zip(self.names, made[0].mean_weights, strict=True)}
            return {**(evaluate() if evaluate else {}), **weights}

        stage.save, stage.evaluate = both, figures
        return (yield stage).json(WEIGHTS)

    def remembering(self, stage: Train) -> Train:
        """The stage, its mixture's course written beside the model and its weights among the logged figures."""
        source, save, evaluate = stage.source, stage.save or self.task.save, stage.evaluate
        accumulate = self.task.system.accumulate

        def both(model: Any, folder: Path) -> None:
            save(model, folder)
            course = [{**line, "step": line["batch"] // accumulate} for line in source.history]
            (folder / COURSE).write_text(json.dumps({"course": course, "drawn": source.drawn}), encoding="utf-8")

        def figures() -> Mapping[str, float]:
            weights = {f"weight of {name}": w for name, w in zip(self.names, source.weights, strict=True)}
            return {**(evaluate() if evaluate else {}), **weights}

        saver: Saver = both
        stage.save, stage.evaluate = saver, figures
        return stage

    def evaluation(self, models: Mapping[str, Artifact]) -> Evaluate:
        """The final perplexities of every domain beside the teacher's, and the course of the weights."""
        return Evaluate("domains", partial(self._evaluate, models))

    def _evaluate(self, models: Mapping[str, Artifact], context: Context) -> tuple[Table, dict[str, Any]]:
        teacher = self.perplexities(self.task.teacher.to(self.task.run.fabric.device), final=True)
        rows: list[dict[str, Any]] = [
            {"name": name, "windows": len(part.train), "teacher": p}
            for name, part, p in zip(self.names, self.parts, teacher, strict=True)
        ]
        columns = [
            Column("windows", "windows", ",d", None, "training windows"),
            Column("teacher", "teacher", ".3f", "lower", "perplexity on held-out text"),
        ]
        pictures: dict[str, str] = {}
        for label, artifact in models.items():
            found = self.perplexities(self.task.load(artifact), final=True)
            ratios = [min(MOST_RATIO, s / t) for s, t in zip(found, teacher, strict=True)]
            left = artifact.json(COURSE) if (artifact.path / COURSE).exists() else None
            for place, row in enumerate(rows):
                row |= {label: found[place], f"{label}/ratio": ratios[place]}
                if left is not None:
                    row[f"{label}/read"] = left["drawn"][place] / sum(left["drawn"])
            columns += [
                Column(label, label, ".3f", "lower", "perplexity on held-out text"),
                Column(f"{label}/ratio", f"{label} : teacher", ".3f", "lower", "ratio of the perplexities"),
            ]
            if left is not None:
                columns.append(Column(f"{label}/read", f"read by {label}", ".1%", None, "share of what it read"))
                context.results |= {f"{label}/{k}": v for k, v in changes(left["course"]).items()}
                if left["course"]:
                    pictures |= self._pictures(label, left["course"], self.task.system.steps)
            context.results |= {
                f"{label}/worst_ratio": max(ratios),
                f"{label}/mean_log_ratio": sum(map(math.log, ratios)) / len(ratios),
                **{f"{label}/{name}": p for name, p in zip(self.names, found, strict=True)},
            }
        notes = ["Weights follow other held-out text than this."]
        return Table("Perplexity by domain", columns, rows, notes), pictures

    def _pictures(self, label: str, course: Sequence[Mapping[str, Any]], steps: int | None) -> dict[str, str]:
        """The course of the weights and of the student's perplexities."""

        def curves(key: str) -> dict[str, list[tuple[float, float]]]:
            last = {**course[-1], "step": max(steps or 0, course[-1]["step"])}
            return {
                name: [(line["step"], line[key][place]) for line in (*course, *([last] if key == "weights" else []))]
                for place, name in enumerate(self.names)
            }

        weights = course_picture(curves("weights"), x="step", y="share of a domain in what is drawn", steps=True)
        seen = course_picture(curves("student"), x="step", y="perplexity of the student", steps=False)
        return {f"{label}-weights.svg": weights, f"{label}-perplexities.svg": seen}


def changes(course: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How much the weights moved: from one interval to the next (sum over the domains), and around their means."""
    weights = torch.tensor([line["weights"] for line in course[1:]], dtype=torch.float64)  # the first are the data's
    if len(weights) < 2:
        return {"weight_change": 0.0, "weight_spread": 0.0}
    return {
        "weight_change": float(weights.diff(dim=0).abs().sum(-1).mean()),
        "weight_spread": float(weights.std(dim=0).mean()),
    }


def _own_domains(system: DomainSystem) -> dict[str, TextData]:
    return load_domains(
        system.data,
        domain_field=system.domain_field,
        split=system.split,
        text_field=system.text_field,
        on_bad_record=system.on_bad_record,
    )


def _as_data(texts: Mapping[str, list[str]]) -> dict[str, TextData]:
    import datasets

    return {
        name: TextData(datasets.Dataset.from_dict({"text": rows}), "text", name, digest("toy domain", rows))
        for name, rows in texts.items()
    }


def _together(parts: Sequence[Windows], name: str) -> Windows:
    """The windows of all domains, one domain after the other."""

    def joined(splits: Sequence[WindowSplit]) -> WindowSplit:
        columns = [split[:] for split in splits]
        return WindowSplit({key: torch.cat([column[key] for column in columns]) for key in columns[0]})

    counts = Counts(**{key: sum(asdict(part.counts)[key] for part in parts) for key in asdict(parts[0].counts)})
    return Windows(
        joined([part.train for part in parts]),
        joined([part.selection for part in parts]),
        joined([part.validation for part in parts]),
        parts[0].window,
        parts[0].kind,
        name,
        digest(*(part.fingerprint for part in parts)),
        counts,
    )


@dataclass(frozen=True)
class DemoTeacher:
    """How the teacher of the embedded domains is made; part of its fingerprint in the cache."""

    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 4
    window: int = 32
    batch_size: int = 64
    steps: int = 1500
    lr: float = 5e-3
    seed: int = 0


def _demo_teacher(system: DomainSystem) -> Generator[Stage, Artifact, tuple[nn.Module, Any]]:
    """A teacher that has read as much of every domain, other documents than the student will read."""
    recipe, rules = DemoTeacher(), ToyDomains(documents=24000, shares=(0.2, 0.2, 0.4, 0.2), draw=1)
    tokenizer = character_tokenizer(CHARACTERS)
    texts = [text for rows in toy_domains(rules).values() for text in rows]
    ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts])
    config = small_llama(
        tokenizer,
        width=recipe.hidden_size,
        feed_forward=recipe.intermediate_size,
        layers=recipe.layers,
        heads=recipe.heads,
        positions=256,
    )
    trained = yield reader(
        "teacher",
        config,
        WindowSplit({"input_ids": ids}),
        tokenizer,
        batch_size=recipe.batch_size,
        steps=recipe.steps,
        lr=recipe.lr,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        warmup=0.05,
        seed=recipe.seed,
        cache={**asdict(recipe), **asdict(rules)},
    )
    return load_causal_lm(str(trained.path))
