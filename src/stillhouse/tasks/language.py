"""The language task: teachers, students and text, embedded or the user's own.

`LanguageSystem` has the fields that all language systems share; `LanguageTask.prepare` turns them into a teacher, a
student, batches and measurements. On the embedded task the text is the English documentation inside CPython, and a
small teacher is trained on it once and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, cosine, linear, wsd
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches, passes_in, steps_in
from stillhouse.data.text import TextData, load_text
from stillhouse.data.windows import Windows, WindowSplit, tokenize_windows
from stillhouse.metrics.language import compare_causal_lms, tokens_per_second
from stillhouse.models.causal_lm import (
    load_causal_lm,
    new_causal_lm,
    output_head,
    parameter_count,
    student_from_spec,
)
from stillhouse.models.lora import add_lora
from stillhouse.models.packing import check_packing
from stillhouse.models.tokenizers import check_same_tokenizer, train_bpe
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.tasks.embedded_lm import reader, save_pretrained, small_llama

DEMO = "demo"
Measure = Callable[[nn.Module], dict[str, float]]
AuditKind = Literal["hacking", "fidelity", "memorisation"]


@dataclass(kw_only=True)
class LanguageSystem(System):
    """Fields of every system that distils causal language models."""

    teacher: Annotated[
        str,
        "directory or hub id of a causal LM; URL#MODEL: behind an OpenAI-compatible endpoint, for systems that can do "
        "with what it says; 'demo': a small one, trained once on the demo text",
    ] = DEMO
    student: Annotated[
        str, "directory, hub id, or the teacher's architecture made smaller: scale:0.25, layers=4,hidden_size=256"
    ] = "scale:0.25"
    data: Annotated[str, ".txt, .jsonl, .json or .parquet file, folder, hub data set id, or 'demo'"] = DEMO
    split: Annotated[str | None, "split of a hub data set"] = None
    text_field: Annotated[str | None, "column that holds the text; found by itself by default"] = None
    on_bad_record: Annotated[Literal["error", "skip"], "what to do with a broken record"] = "error"
    validation: Annotated[float, "share of the text held out and looked at once, for the final table", Gt(0), Lt(1)] = (
        0.05
    )
    selection: Annotated[
        float, "share of the text held out to choose by: the curve during training, keep=best", Gt(0), Lt(1)
    ] = 0.03
    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 512
    packing: Annotated[bool, "put several conversations into a training sequence; they do not see each other"] = False
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 64
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 1
    epochs: Annotated[float, "passes over the data", Gt(0)] = 3.0
    steps: Annotated[int | None, "optimizer steps; by default as many as the epochs need", Ge(1)] = None
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 1e-4
    lr_schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], "course of the learning rate"] = "cosine"
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.01
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Lt(1)] = 0.999
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    pretrain: Annotated[
        float, "passes over the text without a teacher before it begins: for students that start from nothing", Ge(0)
    ] = 0.0
    keep: Annotated[
        Literal["last", "best"], "weights kept: the last, or those with the lowest loss on the selection text"
    ] = "last"
    baseline: Annotated[bool, "also train the same student on the text alone, for comparison"] = False
    eval_windows: Annotated[int, "selection sequences looked at during training", Ge(1)] = 64
    audits: Annotated[
        tuple[AuditKind, ...], "audits taken when all is done; hacking also watches the distance to the teacher"
    ] = ()
    lora: Annotated[
        int | None, "train adapters of this rank (peft) in all linear layers instead of the weights", Ge(1)
    ] = None
    lora_alpha: Annotated[float, "adapters count alpha / rank times", Gt(0)] = 16.0
    gradient_checkpointing: Annotated[bool, "trade time for memory in the student"] = False
    compile: Annotated[bool, "compile the student with torch.compile"] = False
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False

    demo: ClassVar[dict[str, Any]] = {
        "window": 128,
        "batch_size": 8,
        "epochs": 3.0,
        "lr": 2e-3,
        "warmup": 0.05,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "keep": "best",
        "baseline": True,
    }

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO

    def learning_rate(self) -> Schedule:
        """The course of the learning rate, as a factor."""
        if self.lr_schedule == "wsd":
            return wsd(warmup=self.warmup)
        shape = cosine if self.lr_schedule == "cosine" else linear
        return shape(1.0, 1.0 if self.lr_schedule == "constant" else 0.0, warmup=self.warmup)


@dataclass
class TaughtText:
    """What a language task begins with, whoever is to learn: a teacher, its tokenizer, and the text in its tokens."""

    system: LanguageSystem
    run: Run
    teacher: Any  # None where it is behind an endpoint
    tokenizer: Any
    data: TextData
    windows: Windows

    @staticmethod
    def prepare(
        system: LanguageSystem, run: Run, *, student: str | None = None
    ) -> Generator[Stage, Artifact, TaughtText]:
        """Read the text and find the teacher; on the embedded task this yields the stage that trains it.

        ``student``: the directory or hub id whose tokenizer stands for that of a teacher behind an endpoint; by
        default the system's student.
        """
        data = load_text(
            system.data, split=system.split, text_field=system.text_field, on_bad_record=system.on_bad_record
        )
        if data.skipped:
            run.say(f"{data.name}: skipped {data.skipped} bad record(s), such as {data.skipped_examples[0]}")
        if system.teacher == DEMO:
            if system.data != DEMO:
                raise ConfigError("teacher=demo is trained on data=demo; for your own data pass your own teacher")
            teacher, tokenizer = yield from _demo_teacher(data, run)
        elif endpoint_of(system.teacher):
            known = student or system.student
            if is_spec(known):
                raise ConfigError(
                    f"student={known}: the architecture of a teacher behind an endpoint is not known; give "
                    "the student's directory or hub id"
                )
            teacher, (_, tokenizer) = None, load_student(known, system)
        else:
            teacher, tokenizer = load_causal_lm(system.teacher, trust_remote_code=system.trust_remote_code)
        # What is held out does not depend on the seed: the embedded teacher has seen none of it, whatever the seed.
        windows = windows_of(system, data, tokenizer)
        if system.packing and teacher is not None:
            check_packing(teacher)
        return TaughtText(system, run, teacher, tokenizer, data, windows)

    def task(self, student: str | None = None) -> LanguageTask:
        """The task of a student with the teacher's tokenizer; by default the system's."""
        new_student, vocab_size = student_builder(self.system, self.teacher, self.tokenizer, student=student)
        return LanguageTask(
            self.system, self.run, self.teacher, self.tokenizer, self.data, self.windows, vocab_size, new_student
        )


@dataclass
class LanguageTask:
    """What a language system works with, once its fields have been turned into objects."""

    system: LanguageSystem
    run: Run
    teacher: Any  # None where it is behind an endpoint
    tokenizer: Any
    data: TextData
    windows: Windows
    vocab_size: int
    new_student: Callable[[], nn.Module]

    def __post_init__(self) -> None:
        notice = getattr(self.run, "notice", None)  # an audit goes through a run again to find its task
        if notice is not None:
            notice(self)

    @staticmethod
    def prepare(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher."""
        task = (yield from TaughtText.prepare(system, run)).task()
        if system.pretrain:
            steps = task.steps_of(system.pretrain)
            pretrained = yield task.train("pretrain", task.cross_entropy, steps=steps, adapters=False)
            task.begin_as(pretrained)
        return task

    @property
    def save(self) -> Saver:
        """Writes a model with its tokenizer."""
        return partial(save_pretrained, tokenizer=self.tokenizer)

    def begin_as(self, artifact: Artifact) -> None:
        """From now on new students begin as the model that a stage left."""
        self.new_student = lambda: load_student(str(artifact.path), self.system)[0]

    def beginning_as(self, artifact: Artifact) -> LanguageTask:
        """This task with students that begin as the model that a stage left."""
        task = replace(self)
        task.begin_as(artifact)
        return task

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps in so many passes over the training text."""
        return steps_in(epochs, len(self.windows.train), **self._batching())

    def passes_of(self, steps: int) -> int:
        """Passes over the training text in so many optimizer steps."""
        return passes_in(steps, len(self.windows.train), **self._batching())

    def _batching(self) -> dict[str, int]:
        return {"batch_size": self.system.batch_size, "accumulate": self.system.accumulate}

    def observed_teacher(self) -> Observed:
        """The frozen teacher."""
        if self.teacher is None:
            raise ConfigError(
                f"{self.system.name()} needs the teacher's weights; give its directory or hub id as teacher"
            )
        return Observed(self.teacher, frozen=True, name="teacher", options={"use_cache": False})

    def cross_entropy(self, student: Observed) -> Objective:
        """The objective of a student that learns from the text alone."""
        return TokenCrossEntropy(head_of(student), vocab_size=self.vocab_size)

    def train(
        self,
        name: str,
        objective: Callable[[Observed], Objective],
        *,
        steps: int | None = None,
        source: Callable[[Observed], Any] | None = None,
        adapters: bool = True,
    ) -> Train:
        """A stage that trains a new student: ``objective`` gets the observed student.

        ``source`` makes the batches from the observed student too, for those it writes itself; by default they are the
        training text's. ``adapters``: train those alone if the system's ``lora`` says so.
        """
        system = self.system
        model = self.new_student()
        if adapters and system.lora is not None:
            head = output_head(model).path
            add_lora(model, rank=system.lora, alpha=system.lora_alpha, seed=system.seed, layers=(), leave=head)
        if system.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        student = Observed(model, name=name, options={"use_cache": False})
        player = Player(
            name,
            student,
            objective(student),
            optimizer=adamw(system.lr, betas=(0.9, system.beta2), weight_decay=system.weight_decay),
            lr=system.learning_rate(),
            clip=system.clip,
        )
        return Train(
            name,
            player,
            source=self.batches() if source is None else source(student),
            steps=steps or system.steps or self.steps_of(system.epochs),
            accumulate=system.accumulate,
            evaluate=partial(self.selection_figures, model),
            best="selection_loss" if system.keep == "best" else None,
            save=self.save,
            compile=system.compile,
        )

    def batches(self) -> Batches:
        """Batches of the training text."""
        return Batches(self.windows.train, self.system.batch_size, seed=self.system.seed, gather=True)

    def baseline(self) -> Train:
        """The same student on the text alone: what distillation has to beat."""
        return self.train("baseline", self.cross_entropy)

    def load(self, artifact: Artifact) -> nn.Module:
        """The model a stage left."""
        model, _ = load_causal_lm(str(artifact.path), trust_remote_code=self.system.trust_remote_code)
        return model.to(self.run.fabric.device).eval()

    def batches_of(self, split: WindowSplit, most: int | None = None) -> Iterator[Batch]:
        """The first windows of held-out text, in batches."""
        count = min(len(split), most or len(split))
        for start in range(0, count, 8):
            yield self.run.fabric.to_device(split[list(range(start, min(count, start + 8)))])

    def selection_figures(self, model: nn.Module) -> dict[str, float]:
        """Loss and perplexity on the text to choose by: the curve shown during training."""
        batches = self.batches_of(self.windows.selection, self.system.eval_windows)
        # Not through the field: what is watched must not decide whether a stage is done again.
        watched = self.teacher if "hacking" in vars(self.system)["audits"] else None
        known = {} if watched is None else {"teacher": watched.to(self.run.fabric.device)}
        reference = next(iter(known), None)
        models = {**known, "model": model}
        figures = compare_causal_lms(models, batches, vocab_size=self.vocab_size, reference=reference)["model"]
        found = {"selection_loss": figures.loss, "perplexity": figures.perplexity}
        return found if watched is None else {**found, "teacher_kl": figures.kl}

    def evaluation(
        self, models: dict[str, Artifact], *, more: Measure | None = None, columns: Sequence[Column] = ()
    ) -> Evaluate:
        """The final table: the teacher beside the models that were trained.

        ``more`` measures what else a method is about, by model, for ``columns`` of their own.
        """
        return Evaluate("evaluation", partial(self._evaluate, models, more, columns))

    def _evaluate(
        self, artifacts: dict[str, Artifact], more: Measure | None, columns: Sequence[Column], context: Context
    ) -> tuple[Table, dict[str, Any]]:
        known = {} if self.teacher is None else {"teacher": self.teacher.to(self.run.fabric.device).eval()}
        models: dict[str, nn.Module] = {**known}
        models |= {name: self.load(artifact) for name, artifact in artifacts.items()}
        found = compare_causal_lms(
            models,
            self.batches_of(self.windows.validation),
            vocab_size=self.vocab_size,
            reference=next(iter(known), None),
        )
        batch = next(self.batches_of(self.windows.validation))
        rows = []
        for name, figures in found.items():
            row: dict[str, Any] = {
                "name": name,
                "parameters": parameter_count(models[name]),
                "val_loss": figures.loss,
                "perplexity": figures.perplexity,
                "bits_per_byte": figures.bits_per_byte(self.windows.bytes_per_token),
                "accuracy": figures.accuracy,
                "agreement": figures.agreement,
                "kl": figures.kl,
                "ece": figures.reliability.ece,
                "tokens_per_second": tokens_per_second(models[name], batch),
                **(more(models[name]) if more else {}),
            }
            if not known:
                del row["agreement"], row["kl"]
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        note = f"{next(iter(found.values())).tokens:,} predicted tokens of held-out text ({self.data.name})."
        files = {
            "reliability.json": {name: figures.reliability.to_json() for name, figures in found.items()},
            "samples.json": self._samples(models),
        }
        shown = [column for column in (*COLUMNS, *columns) if any(column.key in row for row in rows)]
        return Table("Held-out text", shown, rows, [note]), files

    def _samples(self, models: dict[str, nn.Module], *, count: int = 3, tokens: int = 48) -> list[dict[str, Any]]:
        """How the models continue the same beginnings of held-out text, greedily."""
        longest = min(getattr(model.config, "max_position_embeddings", None) or 1024 for model in models.values())
        tokens = max(1, min(tokens, longest // 2))
        prompt_length = max(1, min(24, self.system.window // 2, longest - tokens))
        rows = self.windows.validation[list(range(min(count, len(self.windows.validation))))]["input_ids"]
        samples = []
        for prompt in rows[:, :prompt_length].to(self.run.fabric.device):
            outputs = {}
            for name, model in models.items():
                generated = model.generate(  # type: ignore[operator]
                    input_ids=prompt[None],
                    attention_mask=torch.ones_like(prompt[None]),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                )
                outputs[name] = self.tokenizer.decode(generated[0, prompt_length:], skip_special_tokens=True)
            samples.append({"prompt": self.tokenizer.decode(prompt), "outputs": outputs})
        return samples


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("perplexity", "perplexity", ".2f", "lower", "exp of the mean negative log-likelihood per token"),
    Column("bits_per_byte", "bits/byte", ".3f", "lower", "comparable between tokenizers"),
    Column("agreement", "agreement", ".1%", "higher", "how often the most likely next token is the teacher's"),
    Column("kl", "KL to teacher", ".3f", "lower", "mean KL(teacher || model) per token, nats"),
    Column("ece", "ECE", ".3f", "lower", "expected calibration error of the most likely token, 15 bins"),
    Column("tokens_per_second", "tokens/s", ",.0f", "higher", "tokens read per second in one forward, on this machine"),
]


def endpoint_of(teacher: str) -> tuple[str, str] | None:
    """(URL, model) of a teacher that is behind an endpoint.

    Raises:
        ConfigError: a URL without the model's name.
    """
    if not teacher.startswith(("http://", "https://")):
        return None
    url, _, model = teacher.partition("#")
    if not model:
        raise ConfigError(f"teacher={teacher!r}: write URL#MODEL, such as http://localhost:8000/v1#Qwen/Qwen3-8B")
    return url, model


def student_builder(
    system: LanguageSystem, teacher: Any, tokenizer: Any, *, student: str | None = None
) -> tuple[Callable[[], nn.Module], int]:
    """How to make a new student (by default the system's), and the vocabulary that both models share."""
    spec = student or system.student
    if is_spec(spec):
        config = student_from_spec(spec, teacher.config)
        return partial(new_causal_lm, config, seed=system.seed), check_same_tokenizer(tokenizer, tokenizer)
    _, own = load_student(spec, system)
    return (lambda: load_student(spec, system)[0]), check_same_tokenizer(tokenizer, own)


def windows_of(system: LanguageSystem, data: TextData, tokenizer: Any) -> Windows:
    """A text in windows, some of them held out, as the system's fields say; see `tokenize_windows`."""
    return tokenize_windows(
        data,
        tokenizer,
        window=system.window,
        validation=system.validation,
        selection=system.selection,
        packing=system.packing,
    )


def is_spec(student: str) -> bool:
    """Whether a student is described by what it takes from its teacher."""
    return student.startswith("scale:") or "=" in student


def load_student(name: str, system: LanguageSystem) -> tuple[Any, Any]:
    """A student to train: in float32, whatever it was saved in; `precision` says what it computes in."""
    return load_causal_lm(name, dtype=torch.float32, trust_remote_code=system.trust_remote_code)


@dataclass(frozen=True)
class DemoTeacher:
    """How the embedded teacher is made; part of its fingerprint in the cache."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 4
    window: int = 128
    batch_size: int = 4
    epochs: float = 6.0
    lr: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0


def _demo_teacher(data: TextData, run: Run) -> Generator[Stage, Artifact, tuple[nn.Module, Any]]:
    recipe = DemoTeacher()
    tokenizer = train_bpe(data.documents["text"], vocab_size=recipe.vocab_size)
    windows = tokenize_windows(
        data,
        tokenizer,
        window=recipe.window,
        validation=LanguageSystem.validation,
        selection=LanguageSystem.selection,
    )
    config = small_llama(
        tokenizer,
        width=recipe.hidden_size,
        feed_forward=recipe.intermediate_size,
        layers=recipe.layers,
        heads=recipe.heads,
        tied=True,
    )
    trained = yield reader(
        "teacher",
        config,
        windows.train,
        tokenizer,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        lr=recipe.lr,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        warmup=0.05,
        seed=recipe.seed,
        cache={
            **asdict(recipe),
            "data": data.fingerprint,
            "config": {**config.to_dict(), "transformers_version": None},
        },
    )
    return load_causal_lm(str(trained.path))
