"""Transfer between languages: sparse fine-tuning for languages and tasks, and a smaller model for two of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.alternating import Alternating
from stillhouse.data.labelled import Labelled, load_labelled
from stillhouse.models.scaling import parameter_count
from stillhouse.models.sparse_masks import (
    SparseDifference,
    applied,
    encoder_parameters,
    largest_changes,
    train_only,
)
from stillhouse.models.text_classifier import load_text_classifier, text_tokenizer
from stillhouse.models.vocab_trimming import cut_down, inherited_layers, trim_tokenizer, used_tokens
from stillhouse.models.width_reduction import narrowed, sampled_states, top_directions
from stillhouse.models.word_replacement import load_word_model
from stillhouse.objectives.encoders import LatentMatch, SoftTargets
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.projected_match import ProjectedMatch
from stillhouse.objectives.regression import SquaredError
from stillhouse.tasks.text_classification import (
    DEMO,
    Examples,
    TextClassificationSystem,
    TextClassificationTask,
    demo_encoder,
    demo_labelled,
    demo_sentences,
    general_text,
    masked_source,
)

DEMO_LANGUAGES = 4
OLD_IDS = "old-ids.json"
DIRECTIONS = "directions.safetensors"
STATES = 4  # sampled for every dimension of the teacher


def language_text(source: str) -> list[str]:
    """Unlabelled text of one language: ``demo:N`` is the embedded language N, else what `general_text` reads."""
    if source.partition(":")[0] != DEMO:
        return general_text(source)
    return demo_sentences(language_number(source), DEMO_LANGUAGES)


def language_number(source: str) -> int:
    """Which of the embedded languages ``demo:N`` is."""
    number = source.partition(":")[2]
    if number not in map(str, range(DEMO_LANGUAGES)):
        raise ConfigError(f"texts: {source!r}: the embedded languages are demo:0 to demo:{DEMO_LANGUAGES - 1}")
    return int(number)


@dataclass(frozen=True)
class Lottery:
    """How sparse fine-tuning is done: all parameters first, then those that moved most alone."""

    density: float
    full_steps: int
    sparse_steps: int
    freeze_norms: bool = False


@dataclass
class BilingualTask(TextClassificationTask):
    """A `TextClassificationTask` whose labels are of one language, with text of several and a test of another.

    ``directions``: of a narrower student, those in which it sees the teacher's hidden states, from the embeddings up.
    """

    texts: tuple[list[str], ...] = ()
    target: Labelled | None = None
    directions: tuple[Tensor, ...] = ()

    @staticmethod
    def prepare_languages(
        system: TextClassificationSystem, run: Run, *, texts: Sequence[str], target_data: str
    ) -> Generator[Stage, Artifact, BilingualTask]:
        """The task; ``texts``: of the source language, of the target language, of more; ``target_data``: its test."""
        if len(texts) < 2:
            raise ConfigError(f"texts: {', '.join(texts)}: give text of the source and of the target language")
        demo = [text.partition(":")[0] == DEMO for text in (*texts, target_data)]
        if set(demo) != {system.data == DEMO}:
            raise ConfigError(f"data={system.data}: texts and target_data must be your own with it, or all be demo's")
        if system.data == DEMO:
            spoken, understood = map(language_number, texts[:2])
            encoder = yield demo_encoder(system.demo_steps, languages=DEMO_LANGUAGES)
            train, validation = demo_labelled(spoken, DEMO_LANGUAGES)
            train, selection = train.held_out(system.selection)
            train = train if system.train_size is None else train.few(system.train_size, seed=system.seed)
            name = str(encoder.path)
            task = TextClassificationTask(system, run, name, text_tokenizer(name), train, selection, validation)
            target: Labelled = demo_labelled(understood, DEMO_LANGUAGES)[1]
        else:
            task = yield from TextClassificationTask.prepare(system, run)
            alone, tested = load_labelled(
                target_data,
                first_field=system.first_field,
                second_field=system.second_field,
                label_field=system.label_field,
                labels="classes" if task.classes else "numbers",
            )
            target = tested or alone
            if target.classes is not None and target.classes != task.classes:
                raise ConfigError(f"target_data={target_data}: its classes are not those of data={system.data}")
        held = {one.name: getattr(task, one.name) for one in fields(TextClassificationTask)}
        return BilingualTask(**held, texts=tuple(language_text(text) for text in texts), target=target)

    def lottery(
        self,
        name: str,
        build: Callable[[], Any],
        objective: Callable[[Observed], Objective],
        how: Lottery,
        *,
        source: Callable[[], Any],
        lr: float,
        dense_head: bool = True,
    ) -> Generator[Stage, Artifact, Artifact]:
        """Sparse fine-tuning of what ``build`` makes: two stages; the second leaves the difference beside the model."""
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0}  # decay would move what must stay
        full = yield self.finetune(f"{name}-full", build(), objective, steps=how.full_steps, source=source(), **options)
        model = build()
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        moved = dict(type(model).from_pretrained(full.path).named_parameters())
        inside = set(encoder_parameters(model))
        chosen = encoder_parameters(model, freeze_norms=how.freeze_norms)
        masks = largest_changes(before, moved, chosen, density=how.density)
        train_only(model, masks, frozen=lambda key: key in inside or not dense_head)

        def save(trained: Any, folder: Path) -> None:
            self.save(trained, folder)
            after = {key: value.detach().cpu() for key, value in trained.named_parameters()}
            SparseDifference.between(before, after, masks).save(folder)

        stage = self.finetune(name, model, objective, steps=how.sparse_steps, source=source(), **options)
        stage.save = save
        return (yield stage)

    def language_differences(
        self, how: Lottery | None, *, lr: float
    ) -> Generator[Stage, Artifact, list[SparseDifference]]:
        """What the encoder changes for each language, learnt on masked tokens of its text; None: nothing is learnt."""
        found: list[SparseDifference] = []
        for number, text in enumerate(self.texts if how is not None else ()):
            assert how is not None
            rows = self.pieces(text)
            made = yield from self.lottery(
                f"language-{number}",
                lambda: load_word_model(self.encoder),
                lambda model: CrossEntropy(model.output("logits"), name="MaskedTokens"),
                how,
                source=partial(self.masked, rows),
                lr=lr,
                dense_head=False,
            )
            found.append(SparseDifference.load(made.path))
        return found

    def adapted(self, *differences: SparseDifference) -> Any:
        """The teacher's encoder with differences added and a new head for the classes."""
        model = self.new_classifier()
        for difference in differences:
            difference.add_to(model)
        return model

    def composed(self, tuned: Artifact, *differences: SparseDifference) -> Any:
        """The head of a tuned model on the teacher's encoder with these differences."""
        model, plain = load_text_classifier(str(tuned.path)), self.new_classifier()
        names = encoder_parameters(model)
        base = dict(plain.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in names:
                    parameter.copy_(base[name])
        for difference in differences:
            difference.add_to(model)
        return model

    def small(self, start: Artifact) -> BilingualTask:
        """The same task for a student with a vocabulary of its own."""
        name = str(start.path)
        return replace(
            self, encoder=name, tokenizer=text_tokenizer(name), directions=read_directions(start.path / DIRECTIONS)
        )

    def cut(
        self,
        factor: int,
        width: int,
        which: str,
        threshold: float,
        differences: Sequence[SparseDifference],
        context: Context,
    ) -> None:
        """The student to begin with: fewer tokens, fewer layers, narrower; its tokenizer and the old ids beside it."""
        keep = used_tokens(self.tokenizer, self.texts, threshold=threshold)
        tokenizer, old = trim_tokenizer(self.tokenizer, keep)
        teacher = self.new_classifier()
        layers = inherited_layers(teacher.config.num_hidden_layers, factor, which=which)
        student = cut_down(teacher, old, layers=layers, tokenizer=tokenizer)
        seen: list[Tensor] = []
        if width > 1:
            student = narrowed(student, width, seed=self.system.seed)
            seen = self.seen_directions(teacher, differences, student.config.hidden_size)
        context.results = {
            "tokens": len(old),
            "tokens_before": len(self.tokenizer),
            "parameters": parameter_count(student),
            "parameters_before": parameter_count(teacher),
        }

        def save(model: Any, folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if seen:
                save_file({str(layer): one.contiguous() for layer, one in enumerate(seen)}, folder / DIRECTIONS)

        context.save(student, saver=save, files={OLD_IDS: old.tolist()})

    def seen_directions(self, teacher: Any, differences: Sequence[SparseDifference], width: int) -> list[Tensor]:
        """The first ``width`` right singular vectors of the teacher's states on text of all languages, for each layer.

        From some tokens of every piece of text, the teacher adapted to its language. One set serves both phases: with
        vectors of its own the task phase would turn what the student has learnt in the general one.
        """
        teacher = teacher.to(self.run.fabric.device).eval()
        generator = torch.Generator().manual_seed(self.system.seed)
        rows = [self.pieces(text) for text in self.texts]
        count = -(-STATES * teacher.config.hidden_size // sum(len(one) for one in rows))
        found: list[list[Tensor]] = [[] for _ in range(teacher.config.num_hidden_layers + 1)]
        for number, one in enumerate(rows):
            with applied(teacher, *([differences[number]] if differences else [])):
                for at in range(0, len(one), 64):
                    batch = self.run.fabric.to_device(one[list(range(at, min(at + 64, len(one))))])
                    for states, new in zip(
                        found, sampled_states(teacher, batch, count=count, generator=generator), strict=True
                    ):
                        states.append(new)
        return [top_directions(torch.cat(states), width) for states in found]

    def reading(self, model: nn.Module, old: Tensor, differences: Sequence[SparseDifference] = ()) -> Observed:
        """A frozen teacher that reads a student's tokens under its own ids, adapted to the language of the batch."""

        def call(run: Callable[..., Any], batch: Batch) -> Any:
            names = ("attention_mask", "token_type_ids")
            ids = old.to(batch["input_ids"].device)[batch["input_ids"]]
            inputs = {"input_ids": ids, **{name: batch[name] for name in names if name in batch}}
            chosen = [differences[int(batch["language"][0])]] if differences else []
            with applied(model, *chosen):
                return run(**inputs)

        return Observed(model, frozen=True, name="teacher", call=call)

    def general(
        self,
        start: Artifact,
        differences: Sequence[SparseDifference],
        how: Literal["distil", "scratch"],
        **options: Any,
    ) -> Train:
        """The general phase: a student on text of all languages in turn, matching the teacher adapted to each.

        ``scratch``: the same shape from random weights, to fill in masked tokens, without a teacher.
        """
        small = self.small(start)
        rows = [small.pieces(text) for text in self.texts]
        if how == "scratch":
            from transformers import AutoModelForMaskedLM

            config = load_text_classifier(small.encoder).config
            torch.manual_seed(self.system.seed)
            masked = [
                masked_source(small.source(one), small.tokenizer, rate=0.15, seed=self.system.seed) for one in rows
            ]
            words = lambda model: CrossEntropy(model.output("logits"), name="MaskedTokens")  # noqa: E731
            fresh = AutoModelForMaskedLM.from_config(config)
            return small.finetune("general", fresh, words, source=Alternating(masked), **options)
        teacher = self.reading(self.new_classifier(), read_ids(start), differences)
        match = lambda model: inner_match(model, teacher, small.directions)  # noqa: E731
        source = Alternating([small.source(one) for one in rows])
        return small.finetune("general", small.new_classifier(), match, source=source, **options)

    def task_objective(self, teacher: Observed, *, temperature: float) -> Callable[[Observed], Objective]:
        """The task phase: hidden states, attention and soft labels; the labels themselves have no part in it."""

        def objective(student: Observed) -> Objective:
            outputs = student.output("logits"), teacher.output("logits")
            soft: Objective = (
                SoftTargets(*outputs, temperature=temperature, rescale=False)
                if self.classes
                else SquaredError(*outputs)
            )
            return inner_match(student, teacher, self.directions) + soft.named("Soft")

        return objective

    def transfer(self, models: dict[str, tuple[BilingualTask, Callable[[str], Any]]]) -> Evaluate:
        """Accuracy in both languages; each model comes with its task and a function of ``source`` or ``target``."""
        return Evaluate("evaluation", partial(self._transfer, models))

    def _transfer(self, models: dict[str, tuple[BilingualTask, Callable[[str], Any]]], context: Context) -> Table:
        assert self.target is not None
        rows: list[dict[str, Any]] = []
        figure = "accuracy" if self.classes else "pearson"
        for name, (task, build) in models.items():
            row: dict[str, Any] = {"name": name}
            for side, data in (("source", self.validation), ("target", self.target)):
                model = build(side).to(self.run.fabric.device)
                row["parameters"] = parameter_count(model)
                row[side] = self.scores(task.logits(model, data), data)[figure]
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        form = ".1%" if self.classes else ".3f"
        columns = [
            Column("parameters", "parameters", ",d", "lower"),
            Column("source", f"{figure}, source language", form, "higher", "the labels are of this language"),
            Column("target", f"{figure}, target language", form, "higher", "no label of this language was seen"),
        ]
        return Table("Zero-shot transfer", columns, rows)


def inner_match(student: Observed, teacher: Observed, directions: Sequence[Tensor] = ()) -> LatentMatch:
    """Attention probabilities and hidden states, the mean over layers each.

    Without a map, or the teacher's states along ``directions`` where it is wider.
    """
    options: dict[str, Any] = {"attention": "probabilities", "padding": "left out", "average": True, "name": "Inner"}
    if directions:
        return ProjectedMatch(student, teacher, directions, **options)
    return LatentMatch(student, teacher, project=False, **options)


def read_ids(start: Artifact) -> Tensor:
    """The teacher's ids of the student's tokens."""
    return torch.tensor(start.json(OLD_IDS))


def read_directions(file: Path) -> tuple[Tensor, ...]:
    """The directions in which a narrower student sees its teacher; none where it is as wide."""
    if not file.is_file():
        return ()
    found = load_file(file)
    return tuple(found[str(layer)] for layer in range(len(found)))


def begin(
    task: BilingualTask,
    spoken: Sequence[SparseDifference],
    *,
    reduction: int,
    hidden_factor: int,
    layers: str,
    threshold: float,
) -> Transform:
    """The stage that trims the vocabulary, takes layers away and perhaps narrows what is left."""
    return Transform("start", partial(task.cut, reduction, hidden_factor, layers, threshold, spoken))


__all__ = [
    "BilingualTask",
    "Examples",
    "Lottery",
    "begin",
    "inner_match",
    "language_text",
    "read_directions",
    "read_ids",
]
