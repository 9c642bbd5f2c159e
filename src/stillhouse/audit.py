"""Audits of any run: measurements added to its folder and its report, without training anything again.

``audit_run("runs/x", "fidelity")`` is ``stillhouse audit runs/x fidelity``. An audit of one kind lies in
``RUN/audits/KIND``, a small run of one stage; it replaces an earlier one of its kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.audits.hacking import figures_of, read_course
from stillhouse.audits.memorisation import memorisation
from stillhouse.base.errors import ConfigError, RunError, suggest
from stillhouse.base.fields import check_fields
from stillhouse.base.files import seed_all
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Audit, Context, artifact_of, finished
from stillhouse.data.responses import Coder
from stillhouse.metrics.fidelity import Said, fidelity_table
from stillhouse.metrics.sequence_distance import sequence_kl
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.text_encoder import TextEncoder
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.report import write_report
from stillhouse.rl.policies import packed, prompts_of
from stillhouse.rl.sampling import LiveSampler
from stillhouse.runs import Finished, run_record, split_values
from stillhouse.systems import get_system
from stillhouse.tasks.fidelity import fidelity_picture, references_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.teacher_hacking import hacking_report

BEGINNINGS = ("pretrain", "begin", "base")  # stages that make what is taught or teaches, not what came of it


@dataclass(kw_only=True)
class HackingOptions:
    """Options of the audit ``hacking``."""

    early: Annotated[float, "share of the evaluations to which the proxy's law is fitted", Gt(0), Lt(1)] = 0.25
    tolerance: Annotated[float, "how far above its law the proxy may be, in logarithms", Gt(0)] = 0.1
    oracle: Annotated[str | None, "directory or hub id of a model that stands for the truth"] = None
    prompts: Annotated[int, "held-out prompts for the distances to an oracle", Ge(1)] = 128
    prompt_tokens: Annotated[int, "tokens of plain text that are a prompt", Ge(1)] = 32
    new_tokens: Annotated[int, "longest response", Ge(1)] = 96


@dataclass(kw_only=True)
class FidelityOptions:
    """Options of the audit ``fidelity``."""

    marker: Annotated[str, "what the final answer follows in a response; empty: all of it is the answer"] = ""
    teacher: Annotated[str | None, "directory or hub id of another teacher to compare with"] = None
    prompts: Annotated[int, "held-out prompts", Ge(1)] = 200
    prompt_tokens: Annotated[int, "tokens of plain text that are a prompt", Ge(1)] = 32
    new_tokens: Annotated[int, "longest response", Ge(1)] = 96
    grams: Annotated[int, "longest n-gram of BLEU", Ge(1)] = 4
    sentence_encoder: Annotated[
        str | None, "directory or hub id of a text encoder, for the cosine of responses' vectors; none: not measured"
    ] = None


@dataclass(kw_only=True)
class MemorisationOptions:
    """Options of the audit ``memorisation``."""

    prefix: Annotated[int | None, "tokens a model is given; by default 50 or half of a sequence", Ge(1)] = None
    suffix: Annotated[int | None, "tokens it must give back; by default 50 or half of a sequence", Ge(1)] = None
    sequences: Annotated[int, "training sequences asked for", Ge(2)] = 1000
    repeats: Annotated[int, "splits the risk predictor is tested on", Ge(1)] = 20
    baseline: Annotated[str | None, "directory or hub id of the student's like that had no teacher"] = None


OPTIONS: dict[str, type] = {
    "hacking": HackingOptions,
    "fidelity": FidelityOptions,
    "memorisation": MemorisationOptions,
}


def audit_run(
    folder: str | Path, kind: str, values: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> Finished:
    """Take an audit of a run, finished or not, and write its report again.

    Args:
        folder: the run's directory.
        kind: ``hacking`` (`HackingOptions`), ``fidelity`` (`FidelityOptions`) or ``memorisation``
            (`MemorisationOptions`).
        values: options, as numbers or as text.

    Raises:
        ConfigError: no such audit or option.
        RunError: the run has not what the audit measures.
    """
    if kind not in OPTIONS:
        raise ConfigError(f"audit={kind!r} is not known{suggest(kind, OPTIONS)}")
    options = OPTIONS[kind](**check_fields(OPTIONS[kind], values or {}, owner=f"audit {kind}"))
    run = Path(folder)
    record = run_record(run)
    measures: dict[str, Callable[[Path, Any], Any]] = {
        "hacking": _hacking,
        "fidelity": _fidelity,
        "memorisation": _memorisation,
    }
    ready = measures[kind](run, options)  # what cannot be audited is refused before anything is replaced
    within = Run(run / "audits" / kind, seed=record["seed"], quiet=quiet, fresh=True)
    info = {"audited": {record["name"]: record["fingerprint"] for record in _records(run)}, "config": vars(options)}
    artifacts = within.execute([Audit(kind, partial(_taken, ready))], info=info)
    return Finished(run, artifacts, write_report(run))


def _taken(ready: Any, context: Context) -> tuple[Table, dict[str, Any]]:
    table, files = ready(context)
    context.results = figures_of(table)
    return table, files


# -- what a run has -------------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[dict[str, Any]]:
    """The records of the finished stages."""
    found = (finished(stage) for stage in sorted((folder / "stages").glob("*")))
    return [record for record in found if record is not None]


class Replay(Run):
    """Goes through a run again without doing anything: what is finished is handed back to the system.

    Attributes:
        task: the language task that the system made, or None.
        models: artifacts of the models that came of the run, by stage.
    """

    task: LanguageTask | None = None

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, quiet=True, **options)
        self.models: dict[str, Artifact] = {}

    def notice(self, task: LanguageTask) -> None:
        """The first task is the run's own; later ones are variations of it."""
        self.task = self.task or task

    def through(self, system: LanguageSystem) -> Replay:
        """Replay as far as stages are finished."""
        done = {stage.name: stage for stage in (self.folder / "stages").glob("*")}
        stages: Any = system.stages(self)
        sent: Artifact | None = None
        with contextlib.closing(stages):
            for number in range(len(done) + 1):
                seed_all(self.seed, "between stages", number)
                try:
                    stage = stages.send(sent)
                except StopIteration:
                    break
                home = done.get(f"{number + 1:02d}-{stage.name}")
                record = finished(home) if home is not None else None
                if home is None or record is None:
                    break
                sent = artifact_of(home, record)
                if not sent.path.exists():
                    raise RunError(f"{home}: what it made is gone from {sent.path}; run the system again")
                if _came_of_it(stage.name, sent):
                    self.models[stage.name] = sent
        return self


def _begins(name: str) -> bool:
    return name in BEGINNINGS or name.startswith("teacher")


def _came_of_it(name: str, artifact: Artifact) -> bool:
    config = artifact.path / "config.json"
    return not _begins(name) and config.exists() and "CausalLM" in config.read_text(encoding="utf-8")


def _replayed(folder: Path, kind: str) -> tuple[LanguageTask, dict[str, Artifact]]:
    """The task of a run and the models that came of it."""
    record = run_record(folder)
    source = record.get("source")
    system_class = get_system(source) if source else None
    if system_class is None or not issubclass(system_class, LanguageSystem):
        what = f"a run of {source}" if source else "not a run of a named system"
        raise RunError(f"{folder} is {what}, which has no causal language models for the audit {kind!r}")
    values = {name: record["config"][name] for name in record["explicit"]}
    system, options = split_values(system_class, {**values, "accelerator": record["options"]["accelerator"]})
    assert isinstance(system, LanguageSystem)
    replay = Replay(folder, seed=system.seed, engine=options.engine()).through(system)
    if replay.task is None or not replay.models:
        raise RunError(
            f"{folder} has no finished language model besides its teacher for the audit {kind!r}; wait for its student"
        )
    return replay.task, replay.models


def _other(name: str, task: LanguageTask) -> nn.Module:
    """A model that the user names, of the task's tokenizer."""
    model, tokenizer = load_causal_lm(name, trust_remote_code=task.system.trust_remote_code)
    check_same_tokenizer(task.tokenizer, tokenizer)
    return model.to(task.run.fabric.device).eval()


def _teacher(task: LanguageTask, kind: str) -> nn.Module:
    if task.teacher is None:
        raise RunError(f"the audit {kind!r} needs the teacher's weights, and this run's teacher is behind an endpoint")
    return task.teacher.to(task.run.fabric.device).eval()


def _prompts(task: LanguageTask, count: int, tokens: int) -> list[list[int]]:
    held_out = task.windows.validation
    return prompts_of(held_out[list(range(min(count, len(held_out))))], tokens)


# -- the audits -------------------------------------------------------------------------------------------------------


def _hacking(folder: Path, options: HackingOptions) -> Any:
    courses = []
    for stage in sorted((folder / "stages").glob("*")):
        name = stage.name.partition("-")[2]
        course = None if _begins(name) else read_course(name, stage / "metrics.jsonl")
        if course is not None and course.proxy is not None:
            courses.append(course)
    if not courses:
        raise RunError(
            f"{folder}: no stage has measured a distance to the teacher or a loss on held-out text twice or more while "
            "it trained, so there is no curve to look at"
        )
    task, models = _replayed(folder, "hacking") if options.oracle else (None, {})
    oracle = _other(options.oracle, task) if options.oracle and task else None

    def ready(context: Context) -> tuple[Table, dict[str, Any]]:
        table, files = hacking_report(courses, window=options.early, tolerance=options.tolerance)
        if oracle is not None and task is not None:
            _add_distances(table, task, models, oracle, options)
        return table, files

    return ready


DISTANCES = [
    Column("to_teacher", "KL from teacher", ".4f", "lower", "KL(teacher || model) of whole responses at the end, nats"),
    Column("to_oracle", "KL from oracle", ".4f", "lower", "KL(oracle || model) of whole responses at the end, nats"),
]


def _add_distances(
    table: Table, task: LanguageTask, models: Mapping[str, Artifact], oracle: nn.Module, options: HackingOptions
) -> None:
    coder = Coder(task.tokenizer)
    prompts = _prompts(task, options.prompts, options.prompt_tokens)
    truths = {"to_teacher": _teacher(task, "hacking"), "to_oracle": oracle}
    drawn = {}
    for key, model in truths.items():
        written = LiveSampler(model, coder, options.new_tokens).write(prompts, seed=task.system.seed)
        drawn[key] = list(map(task.run.fabric.to_device, packed(prompts, written, pad=coder.pad, size=8)))
    measured = {"teacher": truths["to_teacher"], **{name: task.load(artifact) for name, artifact in models.items()}}
    for name, model in measured.items():
        found = {
            key: sequence_kl(truth, model, drawn[key], vocab_size=task.vocab_size).mean for key, truth in truths.items()
        }
        row = next((row for row in table.rows if row["name"] == name), None)
        if row is None:
            table.rows.append({"name": name, **found})
        else:
            row |= found
    table.columns += DISTANCES
    table.notes.append(f"The oracle is {options.oracle}; distances to it after {len(prompts)} held-out prompts.")


def _fidelity(folder: Path, options: FidelityOptions) -> Any:
    task, artifacts = _replayed(folder, "fidelity")
    teacher = _other(options.teacher, task) if options.teacher else _teacher(task, "fidelity")
    trusted = task.system.trust_remote_code
    embed = TextEncoder(options.sentence_encoder, trust_remote_code=trusted) if options.sentence_encoder else None

    def ready(context: Context) -> tuple[Table, dict[str, Any]]:
        coder = Coder(task.tokenizer)
        prompts = _prompts(task, options.prompts, options.prompt_tokens)
        said = {}
        for name in ("teacher", *artifacts):
            model = teacher if name == "teacher" else task.load(artifacts[name])
            written = LiveSampler(model, coder, options.new_tokens, temperature=0.0).write(prompts, seed=0)
            said[name] = Said([one.ids for one in written], [one.text for one in written], options.marker, embed)
        table = fidelity_table(said, references_of(task, len(prompts)), n=options.grams)
        shown = [
            {"prompt": coder.text(prompt), "outputs": {name: one.texts[place] for name, one in said.items()}}
            for place, prompt in enumerate(prompts[:3])
        ]
        return table, {"samples.json": shown, **fidelity_picture({row["name"]: row for row in table.rows})}

    return ready


def _memorisation(folder: Path, options: MemorisationOptions) -> Any:
    task, artifacts = _replayed(folder, "memorisation")
    teacher = _teacher(task, "memorisation")
    if options.baseline is None and "baseline" not in artifacts:
        raise RunError(
            f"{folder}: the audit compares students with a like of theirs that had no teacher; run the system with "
            "baseline=true, or give one with baseline=DIRECTORY"
        )
    if len(artifacts.keys() - {"baseline"}) == 0:
        raise RunError(f"{folder} has no finished student yet for the audit 'memorisation'")
    windows = task.windows.train[:]
    half = windows["input_ids"].shape[1] // 2
    prefix, suffix = options.prefix or min(50, half), options.suffix or min(50, half)
    sequences_NT = windows["input_ids"]
    if "attention_mask" in windows:  # what is shorter would be asked for its padding
        sequences_NT = sequences_NT[windows["attention_mask"].sum(-1) >= prefix + suffix]
    sequences_NT = sequences_NT[: options.sequences]
    if len(sequences_NT) < 2:
        raise RunError(
            f"{folder}: fewer than two training sequences have {prefix + suffix} tokens; lower prefix, suffix"
        )

    def ready(context: Context) -> tuple[Table, dict[str, Any]]:
        models = {"teacher": teacher, **{name: task.load(artifact) for name, artifact in artifacts.items()}}
        if options.baseline is not None:
            models["baseline"] = _other(options.baseline, task)
        texts = task.tokenizer.batch_decode(sequences_NT)
        lengths: dict[str, Any] = {"prefix": prefix, "suffix": suffix, "repeats": options.repeats}
        return memorisation(models, sequences_NT, texts, seed=context.seed, **lengths)

    return ready
