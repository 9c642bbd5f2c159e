"""A grid of students: objectives, sizes and disturbed teachers, and whether they say what the teacher says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Audit, Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.windows import WindowSplit
from stillhouse.losses.divergences import ForwardKL, JensenShannon, ReverseKL, RowDivergence
from stillhouse.losses.perturbed import NoisyTeacher
from stillhouse.metrics.fidelity import Said, corrects, fidelity
from stillhouse.metrics.ranking import rank_correlation
from stillhouse.metrics.significance import one_way_anova, paired_t_test
from stillhouse.models.causal_lm import parameter_count
from stillhouse.models.text_encoder import TextEncoder
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.rl.policies import PolicySource, Share, prompts_of
from stillhouse.tasks.language import LanguageTask, is_spec, save_pretrained, student_builder
from stillhouse.tasks.pictures import matrix_picture, points_picture
from stillhouse.tasks.policies import Policies, PolicySystem, ShareField, refuse_unread
from stillhouse.tasks.sweeps import copied

Way = Literal["sft", "forward-kl", "reverse-kl", "gkd", "seq-kd"]
Builder = Callable[[], nn.Module]
"""Makes a new student."""


UNREAD = (
    "divergence",
    "own_divergence",
    "text",
    "teacher_topk",
    "lm_weight",
    "lm_data",
    "replay",
    "server",
    "teacher_share",
    "accept",
    "own_responses",
)
"""Fields of `PolicySystem` that a grid does not use."""


@dataclass(kw_only=True)
class GridSystem(PolicySystem):
    """Fields of a grid of students."""

    students: Annotated[
        tuple[str, ...], "their sizes, as student, with ; between layers=4;hidden_size=256; none: student"
    ] = ()
    objectives: Annotated[tuple[Way, ...], "what every size is trained with"] = (
        "sft",
        "forward-kl",
        "reverse-kl",
        "gkd",
        "seq-kd",
    )
    disturbed: Annotated[Way, "the objective that is tried with disturbed teachers too"] = "forward-kl"
    noises: Annotated[tuple[float, ...], "standard deviations of noise in the teacher's logits"] = (1.0, 2.0, 5.0)
    temperatures: Annotated[tuple[Annotated[float, Gt(0)], ...], "other temperatures of both"] = (2.0, 5.0)
    unaware: Annotated[bool, "also learn from the teacher as it was before teacher_epochs"] = False
    teacher_epochs: Annotated[float, "passes of the teacher over the text first; 0: it knows the task", Ge(0)] = 4.0
    marker: Annotated[str, "what the final answer follows in a response; empty: all of it is the answer"] = "#"
    sentence_encoder: Annotated[
        str | None, "directory or hub id of a text encoder, for the cosine of responses' vectors; none: not measured"
    ] = None
    groups: Annotated[int, "parts of the held-out prompts that count as tests of their own", Ge(2)] = 14
    on_policy: ShareField = 0.5
    lora: Annotated[int | None, "train adapters of this rank (peft) instead of the weights", Ge(1)] = 8
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 3e-4
    epochs: Annotated[float, "passes over the data", Gt(0)] = 4.0
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 16
    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 256
    new_tokens: Annotated[int, "longest response that is written", Ge(1)] = 256

    def refuse_unread(self) -> None:
        """A `ConfigError` that names the inherited fields which are set though a grid has no use for them.

        An encoder of sentences that cannot be loaded is refused here too, and not after all students are trained.
        """
        also = ["pretrain beside students"] if self.students and vars(self)["pretrain"] else []
        refuse_unread(self, UNREAD, "objectives says what its students learn from", also=also)
        if vars(self)["sentence_encoder"]:  # not as a field that is read: no student depends on it
            TextEncoder(vars(self)["sentence_encoder"], trust_remote_code=vars(self)["trust_remote_code"])

    def builders(self, task: LanguageTask) -> list[Builder]:
        """How to make a student of every size; none of the task's own. To be asked for before anything is trained.

        Raises:
            ConfigError: a shape where the teacher, whose architecture it takes, is behind an endpoint.
            ModelError: no such model, or one that does not have the teacher's tokenizer.
        """
        specs = [spec.replace(";", ",") for spec in self.students]
        for spec in specs:
            if is_spec(spec) and task.teacher is None:
                raise ConfigError(f"students={spec}: the architecture of a teacher behind an endpoint is not known")
        return [student_builder(self, task.teacher, task.tokenizer, student=spec)[0] for spec in specs]

    def cells(self, sizes: int) -> list[Cell]:
        """All objectives at all sizes; and ``disturbed`` at the middle size with disturbed teachers."""
        plain = partial(Cell, sizes // 2, self.disturbed)
        usual = self.temperature
        cells = [Cell(size, way, usual) for size, way in itertools.product(range(sizes), self.objectives)]
        cells += [plain(usual, noise=sigma, mark=f"-noise{sigma:g}") for sigma in self.noises if sigma]
        cells += [plain(other, mark=f"-t{other:g}") for other in self.temperatures if other != usual]
        cells += [plain(usual, unaware=True, mark="-unaware")] if self.unaware else []
        if not cells:
            raise ConfigError("nothing to train: give objectives, noises, temperatures or unaware=true")
        return cells


@dataclass(frozen=True)
class Cell:
    """A student of the grid: which size, what it minimises, and what is done to its teacher."""

    size: int
    way: Way
    temperature: float
    noise: float = 0.0
    unaware: bool = False
    mark: str = ""  # what is unusual about it

    @property
    def name(self) -> str:
        return f"{self.way}{self.mark}-{self.size + 1}"


@dataclass
class Study:
    """The grid's students under one budget, and what they say.

    Args:
        students: sizes as `LanguageSystem.student` has them, ``;`` in place of commas.
        builders: how to make them (`GridSystem.builders`); none: the one size is the task's own student.
        unaware: a teacher that does not know the task.
        marker: what the final answer follows in a response.
        share: of batches that a student of GKD writes itself.
        groups: parts of the held-out prompts that stand for tests of their own in the statistics.
    """

    task: LanguageTask
    policies: Policies
    students: Sequence[str]
    builders: Sequence[Builder] = ()
    unaware: nn.Module | None = None
    marker: str = "#"
    share: float = 0.5
    groups: int = 10
    made: dict[Cell, Artifact] = field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> Generator[Stage, Artifact, None]:
        """Yield the stages of all cells; what they leave is then in `made`."""
        written: Artifact | None = None
        if any(cell.way == "seq-kd" for cell in cells):
            written = yield self.policies.teacher_texts()
        for cell in cells:
            self.made[cell] = yield self.stage(cell, written)

    def stage(self, cell: Cell, written: Artifact | None) -> Train:
        """The training of one student."""
        task = self._sized(cell.size)
        source: Callable[[Observed], Any] | None = None
        if cell.way == "seq-kd":
            assert written is not None
            texts = written
            source = lambda _student: self.policies.batches_of(texts)  # noqa: E731
        elif cell.way == "gkd":
            source = self._mixed
        objective = task.cross_entropy if cell.way in ("sft", "seq-kd") else partial(self.objective, cell)
        stage = task.train(cell.name, objective, source=source)
        model = stage.players.trained[0].module  # type: ignore[union-attr]
        stage.evaluate = partial(self._curve, model)
        stage.eval_every = max(1, stage.steps // 4)
        stage.best = None
        return stage

    def _sized(self, size: int) -> LanguageTask:
        return replace(self.task, new_student=self.builders[size]) if self.builders else self.task

    def objective(self, cell: Cell, student: Observed) -> Objective:
        """The divergence of a cell to its teacher, token by token, with weight 1 and nothing beside it."""
        teacher = self.task.observed_teacher()
        if cell.unaware:
            assert self.unaware is not None
            teacher = Observed(self.unaware, frozen=True, name="teacher", options={"use_cache": False})
        divergence = divergence_of(cell.way, temperature=cell.temperature)
        if cell.noise:
            divergence = NoisyTeacher(divergence, cell.noise)
        name = cell.way.replace("-", " ")
        return TokenMatch(head_of(student), head_of(teacher), divergence, vocab_size=self.task.vocab_size, name=name)

    def _mixed(self, student: Observed) -> PolicySource:
        system, policies = self.task.system, self.policies
        return PolicySource(
            self.task.batches(),
            policies.sampler(student.module, temperature=1.0, sharded=[student.tapped]),
            Share(self.share),
            pad=policies.coder.pad,
            prompt=policies.system.prompt_tokens,
            steps=(system.steps or self.task.steps_of(system.epochs)) * system.accumulate,
            seed=system.seed,
        )

    # -- what models say --------------------------------------------------------------------------------------------

    def says(self, model: nn.Module, split: WindowSplit, most: int, embed: TextEncoder | None = None) -> Said:
        """A model's likeliest responses to the first prompts of a split."""
        policies = self.policies
        prompts = prompts_of(split[list(range(min(most, len(split))))], policies.system.prompt_tokens)
        written = policies.sampler(model, temperature=0.0).write(prompts, seed=0)
        return Said([one.ids for one in written], [one.text for one in written], self.marker, embed)

    def _curve(self, model: nn.Module) -> dict[str, float]:
        windows = self.task.windows
        figures = self.task.selection_figures(model)
        references = references_of(self.task, self.task.system.eval_windows, windows.selection)
        if references is not None:
            right = corrects(self.says(model, windows.selection, len(references)), references)
            figures["answers"] = sum(right) / len(right)
        return figures

    def best(self) -> Artifact:
        """The student with the most right answers on the selection prompts, or the lowest loss where none are known."""

        def worth(artifact: Artifact) -> float:
            return artifact.metrics.get("answers", -artifact.metrics["selection_loss"])

        undisturbed = [artifact for cell, artifact in self.made.items() if not cell.mark]
        return max(undisturbed or list(self.made.values()), key=worth)

    def product(self) -> Transform:
        """The best student under the name of the result."""
        save = partial(save_pretrained, tokenizer=self.task.tokenizer)
        return Transform("student", partial(copied, partial(self.task.load, self.best())), save=save)

    def audit(self, sentence_encoder: str | None = None) -> Audit:
        """The table of all students, with the statistics of the grid; with an encoder also the cosine of responses."""
        return Audit("fidelity", partial(self._audit, sentence_encoder))

    def _audit(self, sentence_encoder: str | None, context: Context) -> tuple[Table, dict[str, Any]]:
        held_out, most = self.task.windows.validation, self.policies.system.own_prompts
        references = references_of(self.task, most)
        trusted = self.task.system.trust_remote_code
        embed = TextEncoder(sentence_encoder, trust_remote_code=trusted) if sentence_encoder else None
        teacher = self.says(self.task.teacher.to(self.task.run.fabric.device).eval(), held_out, most, embed)
        found: list[Scored] = []
        for cell, artifact in self.made.items():
            model = self.task.load(artifact)
            said = self.says(model, held_out, most, embed)
            right = corrects(said, references) if references is not None else []
            figures = vars(fidelity(said, teacher, references))
            found.append(Scored(cell, parameter_count(model), figures, parted(right, self.groups)))
        table, results = grid_table(found, [spec.replace(";", ",") for spec in self.students])
        if references is not None:
            accuracy = corrects(teacher, references)
            results["teacher/accuracy"] = sum(accuracy) / len(accuracy)
            table.rows.insert(0, {"name": "teacher", "accuracy": results["teacher/accuracy"]})
        context.results = {name: value for name, value in results.items() if math.isfinite(value)}
        return table, {"statistics.json": context.results, **grid_pictures(found, self.students)}


def divergence_of(way: Way, *, temperature: float) -> RowDivergence:
    """The divergence of an objective; GKD has no temperature, and beta = 1/2."""
    if way == "gkd":
        return JensenShannon(beta=0.5)
    return ReverseKL(temperature=temperature) if way == "reverse-kl" else ForwardKL(temperature=temperature)


def references_of(task: LanguageTask, most: int, split: WindowSplit | None = None) -> list[str] | None:
    """The first responses of held-out conversations, as text; None for plain text, which has none."""
    held_out = task.windows.validation if split is None else split
    rows: Mapping[str, Tensor] = held_out[list(range(min(most, len(held_out))))]
    if "loss_mask" not in rows:
        return None
    found = []
    for ids_T, mask_T in zip(rows["input_ids"], rows["loss_mask"], strict=True):
        start = int(mask_T.argmax())
        stop = start + int(mask_T[start:].long().cumprod(0).sum())
        found.append(str(task.tokenizer.decode(ids_T[start:stop], skip_special_tokens=True)))
    return found


def parted(values: Sequence[float], groups: int) -> list[float]:
    """Means of ``groups`` parts of the values, every part a value in ``groups``; empty parts are left out."""
    parts = [values[start::groups] for start in range(groups)]
    return [sum(part) / len(part) for part in parts if part]


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A cell, its size, its figures (`Fidelity`), and its accuracy in every group of prompts."""

    cell: Cell
    parameters: int
    figures: Mapping[str, float]
    groups: Sequence[float]


COLUMNS = [
    Column("size", "size"),
    Column("parameters", "parameters", ",d"),
    Column("accuracy", "accuracy", ".1%", "higher", "answers that are right"),
    Column("gain", "gain", "+.1%", "higher", "accuracy above that of the same student on the text alone"),
    Column("agreement", "agreement", ".1%", "higher", "prompts to which it gives the teacher's answer"),
    Column("bleu", "BLEU to teacher", ".3f", "higher", "of all it says, against what the teacher says"),
    Column("cosine", "cosine to teacher", ".3f", "higher", "of sentence vectors of the responses, mean over prompts"),
    Column("identical", "same response", ".1%", "higher", "responses that are the teacher's, token by token"),
    Column("correlation", "fidelity and right", ".2f", None, "Spearman's rho of BLEU and being right, over prompts"),
]


def grid_table(found: Sequence[Scored], sizes: Sequence[str]) -> tuple[Table, dict[str, float]]:
    """The table of a grid, its statistics in the notes, and both as named figures.

    Statistics: Spearman's rho of size and gain, of fidelity and accuracy, of agreement and accuracy and, where there
    are cosines, of BLEU and cosine, over students; a paired t-test of distilled against undistilled students, and a
    one-way analysis of variance over the ways of distilling, both over sizes and groups of prompts.
    """
    alone = {one.cell.size: one for one in found if one.cell.way == "sft" and not one.cell.mark}
    results: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for one in found:
        row: dict[str, Any] = {"name": one.cell.name, "size": sizes[one.cell.size], "parameters": one.parameters}
        row |= {name: value for name, value in one.figures.items() if not math.isnan(value)}
        if one.cell.size in alone and one.cell.way != "sft" and "accuracy" in row:
            row["gain"] = row["accuracy"] - alone[one.cell.size].figures["accuracy"]
        rows.append(row)
        results |= {f"{one.cell.name}/{key}": row[key] for key in row if key not in ("name", "size")}
    notes = []
    plain = [(one, row) for one, row in zip(found, rows, strict=True) if not one.cell.mark and "accuracy" in row]
    gained = [(one, row) for one, row in plain if "gain" in row]

    def related(label: str, words: str, chosen: Sequence[tuple[Scored, dict[str, Any]]], x: str, y: str) -> None:
        rho = rank_correlation([row[x] for _, row in chosen], [row[y] for _, row in chosen])["spearman"]
        if math.isfinite(rho):
            results[f"rho/{label}"] = rho
            notes.append(f"{words}: Spearman's rho {rho:+.2f} over {len(chosen)} students.")

    embedded = [(one, row) for one, row in zip(found, rows, strict=True) if not one.cell.mark and "cosine" in row]
    related("size and gain", "Size and gain", gained, "parameters", "gain")
    related("fidelity and accuracy", "BLEU to the teacher and accuracy", plain, "bleu", "accuracy")
    related("agreement and accuracy", "Agreement and accuracy", plain, "agreement", "accuracy")
    related("BLEU and cosine", "BLEU and cosine to the teacher", embedded, "bleu", "cosine")
    pairs = [(value, other) for one, _ in gained for value, other in zip(one.groups, alone[one.cell.size].groups)]  # noqa: B905
    if len(pairs) > 1:
        test = paired_t_test(*zip(*pairs, strict=True))
        results |= {"t": test.statistic, "t_p": test.p}
        notes.append(f"Distilled against undistilled, {len(pairs)} pairs: t = {test.statistic:.2f}, p = {test.p:.2g}.")
    ways: dict[str, list[float]] = {}
    for one, _ in gained:
        ways.setdefault(one.cell.way, []).extend(one.groups)
    if len(ways) > 1:
        test = one_way_anova(list(ways.values()))
        results |= {"F": test.statistic, "F_p": test.p}
        notes.append(f"Between {', '.join(ways)}: F = {test.statistic:.2f}, p = {test.p:.2g}.")
    shown = [column for column in COLUMNS if any(column.key in row for row in rows)]
    return Table("Generalisation and fidelity", shown, rows, notes), results


def grid_pictures(found: Sequence[Scored], sizes: Sequence[str]) -> dict[str, str]:
    """Accuracy and BLEU by way and size, and accuracy over BLEU."""
    plain = [one for one in found if not one.cell.mark]
    ways = list(dict.fromkeys(one.cell.way for one in plain))
    files = fidelity_picture({one.cell.name: one.figures for one in found})
    for name in ("accuracy", "bleu"):
        known = {(one.cell.way, one.cell.size): one.figures[name] for one in plain}
        values = [[known.get((way, size)) for size in range(len(sizes))] for way in ways]
        if ways and len(known) > 1 and not any(value is None or math.isnan(value) for row in values for value in row):
            files[f"{name}.svg"] = matrix_picture(values, rows=ways, columns=[size.replace(";", ",") for size in sizes])
    return files


def fidelity_picture(points: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Accuracy (where there is none: agreement) over BLEU, a point a model; nothing if there is no BLEU."""
    known = {name: one for name, one in points.items() if not math.isnan(one.get("bleu", math.nan))}
    if not known:
        return {}
    right = all(not math.isnan(one.get("accuracy", math.nan)) for one in known.values())
    text = points_picture(
        {name: (one["bleu"], one["accuracy" if right else "agreement"]) for name, one in known.items()},
        x="BLEU to the teacher's responses",
        y="accuracy" if right else "agreement with the teacher's answers",
    )
    return {"accuracy-over-fidelity.svg": text}


def single_accuracy(figures: Mapping[str, float]) -> float:
    """Accuracy of the one student of a grid of one."""
    return next(
        value for name, value in figures.items() if name.endswith("/accuracy") and not name.startswith("teacher")
    )
