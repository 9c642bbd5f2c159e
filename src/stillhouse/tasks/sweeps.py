"""Sweeps over teachers: each prunes its students out of itself and teaches them, all with one budget."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.metrics.capacity_law import best_teacher, fit_law
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm, parameter_count, student_from_spec
from stillhouse.models.lm_pruning import MaskScores, choose, mask_scores, prune_causal_lm, target_config
from stillhouse.models.scaling import config_parameters
from stillhouse.models.sizes import parse_size
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.tasks.language import LanguageTask, save_pretrained
from stillhouse.tasks.pictures import curves_picture, matrix_picture
from stillhouse.tasks.segments import text_and_teacher

Init = Literal["pruned", "random"]


def is_shape(entry: str) -> bool:
    """Whether an entry describes a model to be made rather than one to be loaded."""
    return "=" in entry or entry.startswith("scale:")


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
    """

    task: LanguageTask
    teachers: Sequence[str]
    students: Sequence[str]
    init: Init = "pruned"
    alpha: float = 0.5
    calibration: int = 64
    teacher_epochs: float = 1.0
    cells: list[Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        # On a command line commas part the entries of a list, so that sizes within one are parted by semicolons.
        self.teachers = [entry.replace(";", ",") for entry in self.teachers]
        self.students = [entry.replace(";", ",") for entry in self.students]

    def find_teachers(self) -> Generator[Stage, Artifact, list[SweepTeacher]]:
        """Load the teachers; those that are shapes are trained first, and kept for other runs of this seed."""
        task, found = self.task, []
        for number, entry in enumerate(self.teachers, 1):
            if is_shape(entry):
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
                check_same_tokenizer(task.tokenizer, tokenizer)
            found.append(SweepTeacher(f"teacher-{number}", model, task, self.calibration))
        return found or [SweepTeacher("teacher", task.teacher, task, self.calibration)]

    def shape(self, teacher: SweepTeacher, entry: str) -> Any:
        """The student's config for one teacher, or None if that teacher is not larger."""
        size: int | str = entry
        if entry.startswith("scale:"):
            size = round(float(entry.removeprefix("scale:")) * parameter_count(self.task.teacher))
        elif not is_shape(entry):
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
        path = str(begin.path)
        task = replace(self.task, new_student=lambda: load_causal_lm(path, dtype=torch.float32)[0])
        frozen = Observed(teacher.model, frozen=True, name=teacher.name, options={"use_cache": False})
        return task.train(name, lambda student: text_and_teacher(task, self.alpha, student, frozen))

    def measure(self, teachers: Sequence[SweepTeacher], context: Context) -> tuple[Table, dict[str, Any]]:
        """Losses of all cells on the selection text, the best teacher of each student size, and the law."""
        losses = {(cell.student, cell.teacher): self._loss(cell.artifact) for cell in self.cells}
        sizes = [teacher.size for teacher in teachers]
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
            by_teacher = {f"{number:,}": losses.get((s, t)) for t, number in enumerate(sizes)}
            rows.append({"name": entry, "parameters": size, **by_teacher, "best": point.teacher, "edge": point.at_edge})
            curves[entry] = [
                (sizes[c.teacher], losses[s, c.teacher]) for c in sorted(mine, key=lambda c: sizes[c.teacher])
            ]
            context.results |= {f"student-{s + 1}/loss by {sizes[c.teacher]}": losses[s, c.teacher] for c in mine}
        law = fit_law(points)
        context.results["k"] = law.k
        columns = [
            Column("parameters", "parameters", ",.0f"),
            *(
                Column(f"{number:,}", f"from {number:,}", ".4f", "lower", "loss of the student of this teacher")
                for number in sizes
            ),
            Column("best", "best teacher", ",.0f", None, "size at the fitted maximum"),
        ]
        note = f"N_T* = {law.k:.2f} N_S"
        note += f", 95 % interval [{law.interval[0]:.2f}, {law.interval[1]:.2f}]" if law.interval else ", no interval"
        note += f"; {sum(p.at_edge for p in points)} of {len(points)} best teachers are at an edge of the grid."
        table = [[row.get(f"{number:,}") for number in sizes] for row in rows]
        files = {
            "law.json": law.to_json(),
            "curves.svg": curves_picture(curves, x="parameters of the teacher", y="loss of the student", log_x=True),
            "matrix.svg": matrix_picture(table, rows=[row["name"] for row in rows], columns=[f"{n:,}" for n in sizes]),
        }
        return Table("Students by teacher", columns, rows, [note]), files

    def _loss(self, artifact: Artifact) -> float:
        batches = self.task.batches_of(self.task.windows.selection)
        model = self.task.load(artifact)
        return compare_causal_lms({"model": model}, batches, vocab_size=self.task.vocab_size)["model"].loss

    def best_cell(self, law: Artifact) -> Cell:
        """The cell of the largest student with the lowest loss on the selection text."""
        sizes = {cell.student: cell.size for cell in self.cells}
        student = max(sizes, key=lambda s: sizes[s])
        row = next(row for row in law.table().rows if row["name"] == self.students[student])
        mine = [cell for cell in self.cells if cell.student == student]
        values = [value for key, value in row.items() if key.replace(",", "").isdigit() and value is not None]
        return mine[min(range(len(mine)), key=lambda place: values[place])]


def copied(model: Callable[[], nn.Module], _context: Context) -> nn.Module:
    """A stage that keeps a model under another name."""
    return model()
