"""Reads a run directory from its JSON files.

It takes what is there: a missing or damaged file costs its own part of the report and a note, no more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stillhouse.base.errors import RunError
from stillhouse.report.wording import hide_arguments, hide_field, hide_secrets, listed, mapping, number, show, text

MOST_PICTURE_BYTES = 4 << 20


@dataclass(frozen=True)
class Column:
    """A column of a result table."""

    key: str
    label: str
    format: str = ""
    better: str | None = None
    help: str = ""


@dataclass(frozen=True)
class Table:
    """A result table as an evaluation or audit left it."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    notes: list[str]

    @property
    def students(self) -> list[int]:
        """Positions of the rows that are not a teacher: by the row's ``role``, else by its name."""
        found = []
        for index, row in enumerate(self.rows):
            role, name = text(row.get("role")).lower(), text(row.get("name")).lower()
            named = bool(re.search(r"\bteachers?\b", name)) and "student" not in name
            if not (role == "teacher" if role else named):
                found.append(index)
        return found

    def cell(self, row: int, column: Column) -> str:
        return show(self.rows[row].get(column.key), column.format)

    def best(self, column: Column) -> set[int]:
        """The student rows that show the best value; empty unless ``better`` is set and the rows differ."""
        values = {row: number(self.rows[row].get(column.key)) for row in self.students}
        known = {row: value for row, value in values.items() if math.isfinite(value)}
        if column.better is None or len({self.cell(row, column) for row in known}) < 2:
            return set()
        pick = min if column.better == "lower" else max
        shown = self.cell(pick(known, key=lambda row: known[row]), column)
        return {row for row in known if self.cell(row, column) == shown}

    @property
    def marks(self) -> bool:
        """Whether any column has a best row."""
        return any(self.best(column) for column in self.columns)


@dataclass(frozen=True)
class StageRecord:
    """One stage folder, read."""

    folder: str
    name: str
    kind: str
    status: str
    seconds: float
    peak_memory_mb: float
    steps: float
    metrics: dict[str, Any]
    artifact: str
    reused: bool
    train: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # player -> lines by step
    evals: list[dict[str, Any]] = field(default_factory=list)
    table: Table | None = None
    reliability: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)  # the SVG files of the artifact, by name
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.folder.replace("-", " ", 1)


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read."""

    path: Path
    name: str
    system: str
    title: str
    citation: str
    status: str
    error: str
    seconds: float
    config: dict[str, Any]
    explicit: set[str]
    demo: set[str]
    fields: dict[str, Any]
    versions: dict[str, Any]
    machine: dict[str, Any]
    git: dict[str, Any]
    argv: list[str]
    raw: dict[str, Any]
    stages: list[StageRecord]

    def source(self, name: str) -> str:
        """Where a field's value came from: ``yours``, ``demo`` or ``default``."""
        return "yours" if name in self.explicit else "demo" if name in self.demo else "default"

    @property
    def fields_by_source(self) -> list[str]:
        """Configuration fields: those the user set, then those of the demo, then the rest."""
        order = ("yours", "demo", "default")
        return sorted(self.config, key=lambda name: order.index(self.source(name)))


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RunError: ``run.json`` is missing or is not a JSON object.
    """
    path = Path(run_dir)
    try:
        raw = json.loads((path / "run.json").read_text("utf-8", errors="replace"))
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory: it holds no run.json") from None
    except (OSError, ValueError) as problem:
        raise RunError(f"{path / 'run.json'} cannot be read: {problem}") from problem
    if not isinstance(raw, dict):
        raise RunError(f"{path / 'run.json'} should hold a JSON object, not {type(raw).__name__}")

    folders = [text(one) for one in listed(raw.get("stages"))]
    folders = [one for one in folders if one and Path(one).name == one and one not in (".", "..")]
    if (path / "stages").is_dir():
        folders += sorted(one.name for one in (path / "stages").iterdir() if one.is_dir() and one.name not in folders)
    return RunRecord(
        path=path,
        name=text(raw.get("name")) or path.resolve().name,
        system=text(raw.get("system")),
        title=text(raw.get("title")) or text(raw.get("system")) or path.resolve().name,
        citation=text(raw.get("citation")),
        status=text(raw.get("status")) or "unknown",
        error=hide_secrets(text(raw.get("error"))).strip(),
        seconds=number(raw.get("seconds")),
        config={str(key): hide_field(str(key), value) for key, value in mapping(raw.get("config")).items()},
        explicit={text(one) for one in listed(raw.get("explicit"))},
        demo={text(one) for one in listed(raw.get("demo"))},
        fields=mapping(raw.get("fields")),
        versions=mapping(raw.get("versions")),
        machine=mapping(raw.get("machine")),
        git=mapping(raw.get("git")),
        argv=hide_arguments([text(one) for one in listed(raw.get("argv"))]),
        raw=raw,
        stages=[
            *(_read_stage(path / "stages" / folder, run_failed=raw.get("status") == "failed") for folder in folders),
            *_audits(path),
        ],
    )


def _audits(path: Path) -> Iterator[StageRecord]:
    """The audits taken of a run after it was done: each is a run of one stage in ``audits``."""
    for home in sorted((path / "audits").glob("*/stages/*")):
        problems: list[str] = []
        made = mapping(_read_json(home.parents[1] / "run.json", problems))
        stage = replace(_read_stage(home, run_failed=made.get("status") == "failed"), folder=f"audit-{home.name[3:]}")
        now = {text(one.get("name")): one.get("fingerprint") for one in _stage_files(path)}
        if any(now.get(name) != fingerprint for name, fingerprint in mapping(made.get("audited")).items()):
            problems.append("the run has changed since; take the audit again")
        yield replace(stage, problems=[*stage.problems, *problems])


def _stage_files(path: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((path / "stages").glob("*")):
        yield mapping(_read_json(folder / "stage.json", [], optional=True))


def _read_stage(folder: Path, *, run_failed: bool) -> StageRecord:
    problems: list[str] = []
    raw = mapping(_read_json(folder / "stage.json", problems)) if folder.is_dir() else {}
    name = re.sub(r"^\d+-", "", folder.name)
    data = folder
    if text(raw.get("cache")):
        data = Path(text(raw["cache"]))
        if not data.is_dir():
            problems.append(f"its cache {data} is gone: no curves and no artifact")
    train: dict[str, dict[float, dict[str, Any]]] = {}
    evals: dict[float, dict[str, Any]] = {}
    for line in _read_lines(data / "metrics.jsonl"):
        step = number(line.get("step"))
        if not math.isfinite(step):
            continue
        if line.get("kind") == "train":  # a resumed run logs some steps twice: the later line counts
            train.setdefault(text(line.get("player")), {})[step] = line
        elif line.get("kind") == "eval":
            evals[step] = line
    status = text(raw.get("status")) or ("unknown" if folder.is_dir() else "no record")
    seconds = number(raw.get("seconds"))
    if status == "running":
        logged = [number(lines[max(lines)].get("seconds")) for lines in train.values()]
        seconds = max((one for one in logged if math.isfinite(one)), default=seconds)
        status = "failed" if run_failed else status
    artifact = data / "artifact"
    about = mapping(raw.get("artifact"))
    kind = text(about.get("kind"))
    return StageRecord(
        folder=folder.name,
        name=text(raw.get("name")) or name,
        kind=text(raw.get("kind")),
        status=status,
        seconds=seconds,
        peak_memory_mb=number(raw.get("peak_memory_mb")),
        steps=number(raw.get("steps")),
        metrics=mapping(raw.get("metrics")),
        artifact="" if kind == "none" else kind,
        reused=bool(raw.get("reused")),
        train={player: [lines[step] for step in sorted(lines)] for player, lines in train.items()},
        evals=[evals[step] for step in sorted(evals)],
        table=_table(_read_json(artifact / "table.json", problems, optional=True)),
        reliability=mapping(_read_json(artifact / "reliability.json", problems, optional=True)),
        samples=[
            one
            for one in listed(_read_json(artifact / "samples.json", problems, optional=True))
            if isinstance(one, dict)
        ],
        pictures=_pictures(artifact, problems),
        problems=problems,
    )


def _pictures(artifact: Path, problems: list[str]) -> dict[str, bytes]:
    found = {}
    for file in sorted(artifact.glob("*.svg")):
        if file.stat().st_size > MOST_PICTURE_BYTES:
            problems.append(f"{file.name} is larger than {MOST_PICTURE_BYTES >> 20} MiB and is not shown")
        else:
            found[file.stem] = file.read_bytes()
    return found


def _table(raw: Any) -> Table | None:
    if not isinstance(raw, dict):
        return None
    columns = [
        Column(
            key=text(one.get("key")),
            label=text(one.get("label")) or text(one.get("key")),
            format=text(one.get("format")),
            better=one.get("better") if one.get("better") in ("lower", "higher") else None,
            help=text(one.get("help")),
        )
        for one in listed(raw.get("columns"))
        if isinstance(one, dict) and one.get("key") != "name"
    ]
    rows = [one for one in listed(raw.get("rows")) if isinstance(one, dict)]
    return Table(text(raw.get("title")), columns, rows, [text(one) for one in listed(raw.get("notes"))])


def _read_json(path: Path, problems: list[str], *, optional: bool = False) -> Any:
    try:
        return json.loads(path.read_text("utf-8", errors="replace"))
    except FileNotFoundError:
        if not optional:
            problems.append(f"{path.name} is missing")
    except (OSError, ValueError, RecursionError) as problem:
        problems.append(f"{path.name} cannot be read: {problem}")
    return None


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; lines cut short by a kill are passed over."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(found, dict):
                    yield found
    except OSError:
        return
