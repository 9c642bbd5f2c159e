"""Sweeps over teachers: each prunes its students out of itself and teaches them, all with one budget.

Teachers may learn a larger vocabulary first, and the best student may be tuned on conversations afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.schedule import cosine
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.docstrings import load_quality
from stillhouse.data.sources import Batches
from stillhouse.data.text import TextData
from stillhouse.data.windows import Windows
from stillhouse.metrics.capacity_law import best_teacher, fit_law
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm, parameter_count, student_from_spec
from stillhouse.models.lm_pruning import MaskScores, choose, mask_scores, prune_causal_lm, target_config
from stillhouse.models.scaling import config_parameters
from stillhouse.models.sizes import parse_size
from stillhouse.models.tokenizer_transfer import transplant
from stillhouse.models.tokenizers import check_same_tokenizer, real_vocab_size
from stillhouse.models.vocab_extension import extended_from
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.tasks.language import (
    LanguageSystem,
    LanguageTask,
    is_spec,
    save_pretrained,
    student_builder,
    windows_of,
)
from stillhouse.tasks.pictures import curves_picture, matrix_picture
from stillhouse.tasks.segments import text_and_teacher

Init = Literal["pruned", "random"]


@dataclass(kw_only=True)
class SweepSystem(LanguageSystem):
    """Fields of systems that sweep over teachers: what may come before and after."""

    vocabulary: Annotated[
        str | None,
        "tokens that teachers learn first: a tokenizer (directory or hub id), or a .txt file, one a line",
    ] = None
    adapt_lr: Annotated[float, "peak learning rate at which teachers learn them", Gt(0)] = 3e-5
    adapt_epochs: Annotated[float, "passes over the text for that", Gt(0)] = 1.0
    chat: Annotated[
        str | None, "conversations on which the student is fine-tuned at the end; 'demo'; none: nothing"
    ] = None
    chat_lr: Annotated[float, "peak learning rate of that", Gt(0)] = 2e-5
    chat_epochs: Annotated[float, "passes over the conversations", Gt(0)] = 3.0
    chat_warmup: Annotated[float, "share of those steps over which the rate rises", Ge(0), Lt(1)] = 0.1


# -- before: a larger vocabulary ------------------------------------------------------------------------------------


@dataclass
class Growth:
    """A larger vocabulary, and how a model learns it: on the text, every weight."""

    before: Any
    tokenizer: Any
    parts: Sequence[Sequence[int]]
    lr: float
    epochs: float

    def stage(self, task: LanguageTask, name: str, model: Any) -> Train:
        """The stage in which ``model`` learns: a new token begins as the mean of the old ones that it stands for."""
        new = partial(transplant, model, self.parts, self.tokenizer, untie=False)
        task = replace(task, new_student=lambda: new().float(), teacher=None)  # one without the tokens is no measure
        stage = task.train(name, task.cross_entropy, steps=task.steps_of(self.epochs), adapters=False)
        system = task.system
        _player(stage).optimizer = adamw(self.lr, betas=(0.9, system.beta2), weight_decay=system.weight_decay)
        stage.best = None
        return stage


def adapted(task: LanguageTask, system: SweepSystem) -> Generator[Stage, Artifact, tuple[LanguageTask, Growth | None]]:
    """The task with the larger vocabulary that the system asks for, its teacher adapted; by default as it was.

    The text is cut anew. (MiniMA adapts LLaMA2-7B so before everything else.)
    """
    conversations(system)  # what is wrong with them is said before anything is trained
    if system.vocabulary is None:
        return task, None
    tokenizer, parts = extended_from(task.tokenizer, system.vocabulary)
    growth = Growth(task.tokenizer, tokenizer, parts, system.adapt_lr, system.adapt_epochs)
    windows = windows_of(system, task.data, tokenizer)
    larger = replace(task, tokenizer=tokenizer, windows=windows, vocab_size=real_vocab_size(tokenizer))
    teacher = larger.load((yield growth.stage(larger, "adapt", task.teacher)))
    new_student, vocab_size = student_builder(system, teacher, tokenizer)
    return replace(larger, teacher=teacher, new_student=new_student, vocab_size=vocab_size), growth


# -- after: conversations -------------------------------------------------------------------------------------------


def conversations(system: SweepSystem) -> TextData | None:
    """What the student is fine-tuned on at the end."""
    if system.chat is None:
        return None
    data = load_quality(system.chat)
    if data.kind == "text":
        raise ConfigError(f"chat={system.chat}: plain text; give conversations (messages, or prompts and completions)")
    return data


def chatted(
    task: LanguageTask, student: Artifact, system: SweepSystem
) -> Generator[Stage, Artifact, tuple[dict[str, Artifact], dict[str, Any]]]:
    """Fine-tune the student on the answers of conversations, if the system has some.

    Returns:
        The model by name, and options of `LanguageTask.evaluation` that add its loss on held-out conversations.
    """
    data = conversations(system)
    if data is None:
        return {}, {}
    windows = windows_of(system, data, task.tokenizer)
    tuned = yield chat_stage(task, student, windows, system)
    loss = Column("chat_loss", "conversations", ".4f", "lower", "loss on held-out answers, nats per token")
    return {"chat": tuned}, {"more": partial(_chat_loss, task, windows), "columns": [loss]}


def chat_stage(task: LanguageTask, student: Artifact, windows: Windows, system: SweepSystem) -> Train:
    """Supervised fine-tuning of a student: only answers are predicted."""
    batches = Batches(windows.train, system.batch_size, seed=system.seed, gather=True)
    begin = task.beginning_as(student)
    steps = max(1, round(system.chat_epochs * len(batches) / system.accumulate))
    stage = begin.train("chat", task.cross_entropy, steps=steps)
    player = _player(stage)
    player.optimizer = adamw(system.chat_lr, betas=(0.9, system.beta2), weight_decay=system.weight_decay)
    player.lr = cosine(1.0, 0.0, warmup=system.chat_warmup)
    stage.source, stage.best, stage.evaluate = batches, None, None
    return stage


def _chat_loss(task: LanguageTask, windows: Windows, model: nn.Module) -> dict[str, float]:
    found = compare_causal_lms({"model": model}, task.batches_of(windows.validation), vocab_size=task.vocab_size)
    return {"chat_loss": found["model"].loss}


def _player(stage: Train) -> Player:
    """The player of a stage that `LanguageTask.train` made."""
    assert isinstance(stage.players, Player)
    return stage.players


# -- the sweep ------------------------------------------------------------------------------------------------------


@dataclass
class SweepTeacher:
    """A teacher of a sweep, and what its parts are worth to it."""

    name: str
    model: Any
    task: LanguageTask
    calibration: int
    scores: list[MaskScores] = field(default_factory=list)

    @cached_property
    def size(self) -> int:
        return parameter_count(self.model)

    def worth(self) -> MaskScores:
        """Mask scores on the first windows of the training text; computed once."""
        if not self.scores:
            objective = TokenCrossEntropy(head_of(Observed(self.model, name=self.name, options={"use_cache": False})))
            train, device = self.task.windows.train, self.task.run.fabric.device
            count = min(self.calibration, len(train))
            places = [list(range(at, min(at + 8, count))) for at in range(0, count, 8)]
            self.model.requires_grad_(True).to(device).eval()

            def loss(batch: Any) -> Tensor:
                return objective(batch)

            batches = (self.task.run.fabric.to_device(train[place]) for place in places)
            self.scores.append(mask_scores(self.model, loss, batches))
        return self.scores[0]


@dataclass
class Cell:
    """One pair of the grid: a student of one size and the teacher it was pruned from."""

    student: int
    teacher: int
    artifact: Artifact
    size: int


@dataclass
class Sweep:
    """A grid of teachers and student sizes under one budget.

    Args:
        teachers: directories, hub ids, or shapes of models that are trained on the text first, with equal steps.
        students: numbers of parameters (``0.5B``), shares of the task's teacher (``scale:0.1``) or shapes.
        init: ``pruned`` from the teacher, or ``random``.
        alpha: weight of the teacher's distributions; the text gets the rest.
        calibration: windows on which parts are scored.
        teacher_epochs: passes over the text of teachers that are made.
        growth: the larger vocabulary that teachers which are loaded learn first; the task has it already.
    """

    task: LanguageTask
    teachers: Sequence[str]
    students: Sequence[str]
    init: Init = "pruned"
    alpha: float = 0.5
    calibration: int = 64
    teacher_epochs: float = 1.0
    growth: Growth | None = None
    cells: list[Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        # On a command line commas part the entries of a list, so that sizes within one are parted by semicolons.
        self.teachers = [entry.replace(";", ",") for entry in self.teachers]
        self.students = [entry.replace(";", ",") for entry in self.students]

    def find_teachers(self) -> Generator[Stage, Artifact, list[SweepTeacher]]:
        """Load the teachers; those that are shapes are trained first, and kept for other runs of this seed."""
        task, found = self.task, []
        for number, entry in enumerate(self.teachers, 1):
            if is_spec(entry):
                config = student_from_spec(entry, task.teacher.config)
                new = partial(new_causal_lm, config, seed=task.system.seed)
                stage = replace(task, new_student=new).train(
                    f"teacher-{number}", task.cross_entropy, steps=task.steps_of(self.teacher_epochs)
                )
                stage.best = None
                known = {**config.to_dict(), "transformers_version": None}
                names = (
                    "seed",
                    "lr",
                    "lr_schedule",
                    "warmup",
                    "weight_decay",
                    "beta2",
                    "clip",
                    "batch_size",
                    "accumulate",
                )
                recipe = {name: getattr(task.system, name) for name in names}
                stage.cache = {"config": known, "text": task.windows.fingerprint, "steps": stage.steps, **recipe}
                made = yield stage
                model: Any = task.load(made)
            else:
                model, tokenizer = load_causal_lm(entry, trust_remote_code=task.system.trust_remote_code)
                check_same_tokenizer(self.growth.before if self.growth else task.tokenizer, tokenizer)
                if self.growth:
                    model = task.load((yield self.growth.stage(task, f"teacher-{number}-adapt", model)))
            found.append(SweepTeacher(f"teacher-{number}", model, task, self.calibration))
        return found or [SweepTeacher("teacher", task.teacher, task, self.calibration)]

    def shape(self, teacher: SweepTeacher, entry: str) -> Any:
        """The student's config for one teacher, or None if that teacher is not larger."""
        size: int | str = entry
        if entry.startswith("scale:"):
            size = round(float(entry.removeprefix("scale:")) * parameter_count(self.task.teacher))
        elif not is_spec(entry):
            size = round(parse_size(entry))
        if isinstance(size, int) and size >= teacher.size:
            return None
        config = target_config(teacher.model.config, size)
        return config if config_parameters(config) < teacher.size else None

    def run(self) -> Generator[Stage, Artifact, list[SweepTeacher]]:
        """Yield the stages of all cells; the cells are then in `cells`."""
        teachers = yield from self.find_teachers()
        for t, teacher in enumerate(teachers):
            for s, entry in enumerate(self.students):
                config = self.shape(teacher, entry)
                if config is not None:
                    name = f"{teacher.name}-student-{s + 1}"
                    begin = yield Transform(
                        f"{name}-begin",
                        partial(self._begin, teacher, config),
                        save=partial(save_pretrained, tokenizer=self.task.tokenizer),
                    )
                    artifact = yield self.distil(name, teacher, begin)
                    self.cells.append(Cell(s, t, artifact, config_parameters(config)))
        if not self.cells:
            raise ConfigError("no teacher is larger than a student; give larger teachers, or smaller students")
        return teachers

    def _begin(self, teacher: SweepTeacher, config: Any, _context: Context) -> nn.Module:
        """The student before it is taught."""
        if self.init == "random":
            return new_causal_lm(config, seed=self.task.system.seed)
        kept = choose(teacher.worth(), teacher.model.config, config)
        return prune_causal_lm(teacher.model, config, kept).float()

    def distil(self, name: str, teacher: SweepTeacher, begin: Artifact) -> Stage:
        """0.5 cross-entropy + 0.5 soft cross-entropy to the teacher it came from, over all tokens."""
        task = self.task.beginning_as(begin)
        frozen = Observed(teacher.model, frozen=True, name=teacher.name, options={"use_cache": False})
        return task.train(name, lambda student: text_and_teacher(task, self.alpha, student, frozen))

    def measure(self, teachers: Sequence[SweepTeacher], context: Context) -> tuple[Table, dict[str, Any]]:
        """Losses of all cells on the selection text, the best teacher of each student size, and the law."""
        losses = {(cell.student, cell.teacher): self._loss(cell.artifact) for cell in self.cells}
        sizes, labels = [teacher.size for teacher in teachers], labels_of(teachers)
        rows: list[dict[str, Any]] = []
        points, curves = [], {}
        for s, entry in enumerate(self.students):
            mine = [cell for cell in self.cells if cell.student == s]
            if not mine:
                continue
            size = sum(cell.size for cell in mine) / len(mine)  # shapes found by a search differ a little
            scores = [-losses.get((s, t), float("nan")) for t in range(len(teachers))]
            point = best_teacher(sizes, scores, size)
            points.append(point)
            by_teacher = {label: losses.get((s, t)) for t, label in enumerate(labels)}
            rows.append({"name": entry, "parameters": size, **by_teacher, "best": point.teacher, "edge": point.at_edge})
            curves[entry] = [
                (sizes[c.teacher], losses[s, c.teacher]) for c in sorted(mine, key=lambda c: sizes[c.teacher])
            ]
            found = {labels[c.teacher].replace(",", ""): losses[s, c.teacher] for c in mine}
            context.results |= {f"student-{s + 1}/loss by {label}": loss for label, loss in found.items()}
        law = fit_law(points)
        context.results["k"] = law.k
        columns = [
            Column("parameters", "parameters", ",.0f"),
            *(
                Column(label, f"from {label}", ".4f", "lower", "loss of the student of this teacher")
                for label in labels
            ),
            Column("best", "best teacher", ",.0f", None, "size at the fitted maximum"),
        ]
        note = f"N_T* = {law.k:.2f} N_S"
        note += f", 95 % interval [{law.interval[0]:.2f}, {law.interval[1]:.2f}]" if law.interval else ", no interval"
        note += f"; {sum(p.at_edge for p in points)} of {len(points)} best teachers are at an edge of the grid."
        table = [[row.get(label) for label in labels] for row in rows]
        files = {
            "law.json": law.to_json(),
            "curves.svg": curves_picture(curves, x="parameters of the teacher", y="loss of the student", log_x=True),
            "matrix.svg": matrix_picture(table, rows=[row["name"] for row in rows], columns=labels),
        }
        return Table("Students by teacher", columns, rows, [note]), files

    def _loss(self, artifact: Artifact) -> float:
        batches = self.task.batches_of(self.task.windows.selection)
        model = self.task.load(artifact)
        return compare_causal_lms({"model": model}, batches, vocab_size=self.task.vocab_size)["model"].loss

    def best_cell(self, law: Artifact, teachers: Sequence[SweepTeacher]) -> Cell:
        """The cell of the largest student with the lowest loss on the selection text."""
        sizes = {cell.student: cell.size for cell in self.cells}
        student = max(sizes, key=lambda s: sizes[s])
        row = next(row for row in law.table().rows if row["name"] == self.students[student])
        mine = [cell for cell in self.cells if cell.student == student]
        labels = labels_of(teachers)
        return min(mine, key=lambda cell: row[labels[cell.teacher]])


def labels_of(teachers: Sequence[SweepTeacher]) -> list[str]:
    """What teachers are called in tables: their sizes, and their names too where sizes are alike."""
    sizes = [f"{teacher.size:,}" for teacher in teachers]
    return [
        size if sizes.count(size) == 1 else f"{size} ({teacher.name})"
        for size, teacher in zip(sizes, teachers, strict=True)
    ]


def copied(model: Callable[[], nn.Module], _context: Context) -> nn.Module:
    """A stage that keeps a model under another name."""
    return model()
