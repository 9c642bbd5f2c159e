"""Reads a run directory from its JSON files and writes it down as one self-contained page.

The reader takes what is there: a missing or damaged file costs its own part of the page and a note, no more.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from stillhouse.base.errors import RunError
from stillhouse.report.figures import (
    DASHES,
    PALETTE,
    RELIABILITY_KEYS,
    SERIES_COLORS,
    Bar,
    Plot,
    Series,
    bar_plot,
    compact,
    line_plot,
    reliability_plot,
)

MOST_PLOTTED_STAGES = 12
MOST_VALUES = 8
MOST_SAMPLES = 40
OPEN_SAMPLES = 4

THEME_SCRIPT = """
(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches; }
  function name() { button.textContent = isDark() ? "Light" : "Dark"; }
  button.hidden = false;
  button.addEventListener("click", function () { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  name();
})();
"""


# --- the run directory ----------------------------------------------------------------------------


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
        stages=[_read_stage(path / "stages" / folder, run_failed=raw.get("status") == "failed") for folder in folders],
    )


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
        problems=problems,
    )


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


def number(value: Any) -> float:
    """``value`` as a float; NaN for whatever is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- values as text -------------------------------------------------------------------------------

_FORMAT = re.compile(r"[+ ]?[,_]?(\.\d{1,2})?[bdeEfFgGn%]?")  # no widths: they could ask for gigabytes
_SECRET_FIELD = re.compile(
    r"(^|[_.-])(api[_-]?key|secret[_-]?key|client[_-]?secret|password|passwd|credentials?|"
    r"(access|auth|api|bearer|hf)[_-]?token)$",
    re.IGNORECASE,
)
_SECRETS = (
    (re.compile(r"\b(hf_|sk-|ghp_|gho_|glpat-)[A-Za-z0-9_-]{12,}"), r"\1(hidden)"),
    (re.compile(r"(://)[^\s/:@]+:[^\s/@]+@"), r"\1(hidden)@"),
)


def show(value: Any, format_spec: str = "") -> str:
    """A result for people: by its own format if that fits, else compactly; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value) if isinstance(value, str) else plain(value)
    if not math.isfinite(number(value)):
        return compact(number(value))
    if format_spec and _FORMAT.fullmatch(format_spec):
        whole = format_spec[-1] in "bdn" and isinstance(value, float) and value.is_integer()
        try:
            return format(int(value) if whole else value, format_spec).replace("-", "−")
        except (ValueError, OverflowError):
            pass
    return compact(number(value))


def plain(value: Any) -> str:
    """A configuration value as it would be typed: strings bare, the rest as JSON."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``3 min 20 s``, ``1 h 05 min``; a dash if unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def memory(megabytes: float) -> str:
    if not math.isfinite(megabytes) or megabytes < 0:
        return "–"
    return f"{megabytes / 1024:.2f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def when(stamp: Any) -> str:
    """An ISO time as a date people read; whatever else it holds, unchanged."""
    try:
        moment = datetime.fromisoformat(text(stamp))
    except ValueError:
        return text(stamp)
    zone = f" {moment:%Z}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def hide_secrets(message: str) -> str:
    """``message`` without access tokens and passwords in addresses."""
    for pattern, instead in _SECRETS:
        message = pattern.sub(instead, message)
    return message


def hide_field(name: str, value: Any) -> Any:
    """A configuration value that may be shown: the report travels, credentials must not."""
    if isinstance(value, dict):
        return {key: hide_field(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_field(name, inner) for inner in value]
    if isinstance(value, str):
        return "(hidden)" if value and _SECRET_FIELD.search(name) else hide_secrets(value)
    return value


def hide_arguments(argv: Sequence[str]) -> list[str]:
    """A command line that may be shown."""
    shown, hide_next = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        secret = bool(_SECRET_FIELD.search(name.lstrip("-")))
        if hide_next:
            shown.append("(hidden)")
        elif secret and equals:
            shown.append(f"{name}=(hidden)" if value else word)
        else:
            shown.append(hide_secrets(word))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def command_line(argv: Sequence[str]) -> str:
    """``argv`` as it is typed, with the program's folder left away."""
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""


def write_whole(path: Path, content: str) -> Path:
    """Write ``content`` so that ``path`` holds all of it or what it held before."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(content.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


# --- the page -------------------------------------------------------------------------------------


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``: one file, no network, readable without JavaScript.

    The page depends on nothing but the run directory: writing it twice gives the same bytes.

    Raises:
        RunError: ``run_dir`` holds no readable ``run.json``, or the page cannot be written.
    """
    run = read_run(run_dir)
    page = render(run)
    try:
        return write_whole(run.path / "report.html", page)
    except OSError as problem:
        raise RunError(f"the report of {run.path} cannot be written: {problem}") from problem


def render(run: RunRecord) -> str:
    """The page of a run."""
    environment = Environment(
        loader=FunctionLoader(lambda name: files("stillhouse.report").joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"duration": duration, "memory": memory, "compact": compact, "plain": plain}
    script = THEME_SCRIPT.strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    trained = [stage for stage in run.stages if stage.train or stage.evals]
    plotted = _spread(trained, MOST_PLOTTED_STAGES)
    looks = _looks(trained)
    samples = [sample for stage in run.stages for sample in _samples(stage)]
    return environment.get_template("report.html.j2").render(
        run=run,
        css=files("stillhouse.report").joinpath("report.css").read_text("utf-8"),
        palette=PALETTE,
        script=script,
        script_hash=digest,
        facts=_facts(run),
        state=_state(run),
        results=[stage for stage in run.stages if stage.table],
        reliability=_reliability(run),
        reliability_keys=RELIABILITY_KEYS,
        samples=samples[:MOST_SAMPLES],
        samples_left=max(len(samples) - MOST_SAMPLES, 0),
        open_samples=OPEN_SAMPLES,
        training=[(stage, _training(stage, looks, f"t{index}")) for index, stage in enumerate(plotted)],
        training_left=len(trained) - len(plotted),
        cost=_cost(run),
        command=command_line(run.argv),
        machine=_machine(run),
        show=show,
    )


def _spread(stages: list[StageRecord], most: int) -> list[StageRecord]:
    """All stages, or the first and last of too many."""
    return stages if len(stages) <= most else stages[: most // 2] + stages[-(most - most // 2) :]


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    raw = run.raw
    word = {"done": "finished", "running": "unfinished", "failed": "failed"}.get(run.status, run.status)
    done = sum(stage.status == "done" for stage in run.stages)
    facts = [
        ("Run", run.name),
        ("Status", word),
        ("Started", when(raw.get("created"))),
        ("Duration" if run.status in ("done", "failed") else "Time so far", duration(run.seconds)),
        ("Seed", text(raw.get("seed"))),
        ("Stages", str(done) if done == len(run.stages) else f"{done} done, {len(run.stages) - done} not"),
        ("Card", text(raw.get("card"))),
    ]
    return [(label, value) for label, value in facts if value and value != "–"]


def _state(run: RunRecord) -> dict[str, str]:
    """What stands above all else if the run did not finish: kind, headline, the error's line and its rest."""
    stopped = next((stage for stage in run.stages if stage.status in ("failed", "running", "no record")), None)
    where = f" in stage {stopped.label}" if stopped else ""
    if run.status == "failed" or run.error:
        lines = [line for line in run.error.splitlines() if line.strip()]
        traced = bool(lines) and lines[0].startswith("Traceback")
        first = (lines[-1] if traced else lines[0]) if lines else "No error message was recorded."
        return {
            "kind": "failed",
            "head": f"This run failed{where}.",
            "line": first,
            "rest": run.error if len(lines) > 1 else "",
        }
    if run.status == "done":
        return {}
    line = "It may still be going, or it may have been stopped; the page shows what was on disk."
    steps = [number(lines[-1].get("step")) for lines in stopped.train.values()] if stopped else []
    if steps:
        line += f" The last line logged there is of step {compact(max(steps))}."
    at = f" it had come to stage {stopped.label}" if stopped else " it was not done"
    return {"kind": "running", "head": f"Unfinished:{at} when this page was written.", "line": line, "rest": ""}


def _samples(stage: StageRecord) -> Iterator[dict[str, Any]]:
    for one in stage.samples:
        outputs = {str(name): text(output) for name, output in mapping(one.get("outputs")).items()}
        if outputs:
            yield {"prompt": text(one.get("prompt")), "outputs": outputs}


def _reliability(run: RunRecord) -> list[Plot]:
    plots: list[Plot | None] = []
    for stage in run.stages:
        for name, about in stage.reliability.items():
            bins = [
                (number(one.get("confidence")), number(one.get("accuracy")), number(one.get("count")))
                for one in listed(mapping(about).get("bins"))
                if isinstance(one, dict)
            ]
            plots.append(reliability_plot(f"r{len(plots)}", name, bins, number(mapping(about).get("ece"))))
    return [plot for plot in plots if plot]


@dataclass(frozen=True)
class Group:
    """The figures of one player, and in a line what never changed."""

    title: str
    plots: list[Plot]
    constants: list[tuple[str, str]]

    @property
    def bucket(self) -> int:
        """How many logged values a point stands for, at most."""
        return max((plot.bucket for plot in self.plots), default=1)


def _looks(stages: Sequence[StageRecord]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Colour and dash of each loss term: the same term looks the same all over the page."""
    names: dict[str, None] = {}
    for stage in stages:
        for lines in stage.train.values():
            for line in lines:
                names.update(dict.fromkeys(mapping(line.get("terms"))))
    count = len(SERIES_COLORS)
    return {
        name: (SERIES_COLORS[index % count], DASHES[(index + index // count) % len(DASHES)])
        for index, name in enumerate(names)
    }


def _training(stage: StageRecord, looks: Mapping[str, tuple[str, tuple[float, ...]]], prefix: str) -> list[Group]:
    players = [
        _player(player, lines, looks, f"{prefix}p{index}") for index, (player, lines) in enumerate(stage.train.items())
    ]
    names = dict.fromkeys(name for line in stage.evals for name in mapping(line.get("metrics")))
    plots: list[Plot | None] = []
    constants = []
    for index, name in enumerate(names):
        points = [
            (number(line["step"]), number(mapping(line.get("metrics")).get(name, math.nan)))
            for line in stage.evals
            if name in mapping(line.get("metrics"))
        ]
        one = Series(name, [x for x, _ in points], [y for _, y in points])
        if len(points) == 1:
            constants.append((f"{name} at step {compact(points[0][0])}, evaluated once", compact(points[0][1])))
        else:
            plots.append(line_plot(f"{prefix}e{index}", f"Evaluation: {name}", name, [one], steep=True, markers=True))
    evals = Group("", [plot for plot in plots if plot], constants)
    if len(players) == 1 and players[0].plots:
        only = players[0]
        return [Group("", [only.plots[0], *evals.plots, *only.plots[1:]], only.constants + evals.constants)]
    return [group for group in (evals, *players) if group.plots or group.constants]


def _player(
    player: str,
    lines: Sequence[dict[str, Any]],
    looks: Mapping[str, tuple[str, tuple[float, ...]]],
    prefix: str,
) -> Group:
    constants: list[tuple[str, str]] = []
    plots: list[Plot | None] = []

    def series(name: str, read: Any, color: str = "ink", dash: tuple[float, ...] = (), width: float = 1.5) -> Series:
        points = [(number(line["step"]), number(found)) for line in lines for found in read(line)]
        return Series(name, [x for x, _ in points], [y for _, y in points], color, dash, width)

    def terms(key: str) -> list[Series]:
        def reader(name: str) -> Any:
            def read(line: dict[str, Any]) -> Iterable[Any]:
                term = mapping(mapping(line.get("terms")).get(name))
                return [term[key]] if key in term else []

            return read

        return [one for name, look in looks.items() if (one := series(name, reader(name), *look)).x]

    def plot(
        title: str,
        ylabel: str,
        many: Sequence[Series],
        label: str,
        *,
        unit_interval: bool = False,
        steep: bool = False,
        always: bool = False,
    ) -> None:
        """Draw what changes; say what does not, and what never was finite."""
        for one in many:
            if one.x and not one.finite:
                constants.append((label.format(one.name), f"never finite in {len(one.x):,} logged values"))
        if all(one.constant for one in many) and not always:
            constants.extend((label.format(one.name), compact(one.y[0])) for one in many)
        else:
            plots.append(
                line_plot(f"{prefix}f{len(plots)}", title, ylabel, many, unit_interval=unit_interval, steep=steep)
            )

    def field_of(key: str) -> Any:
        return lambda line: [line[key]] if key in line else []

    total = series("total", field_of("loss"), width=1.8)
    parts = terms("value")
    if len(parts) == 1 and parts[0].x == total.x and parts[0].y == total.y:
        plot(f"Loss: {parts[0].name}", "loss", parts, "loss {}", steep=True, always=True)
    else:
        plot("Loss", "loss", [total, *parts], "loss {}", steep=True, always=True)
    plot("Weights of the terms", "weight", terms("weight"), "weight of {}")
    plot(
        "Gradient shares",
        "share of the gradient (0 to 1)",
        terms("share"),
        "gradient share of {}",
        unit_interval=True,
    )
    values = dict.fromkeys(name for line in lines for name in mapping(line.get("values")))
    for name in list(values)[:MOST_VALUES]:
        one = series(
            name,
            lambda line, name=name: [v[name]] if name in (v := mapping(line.get("values"))) else [],
            "s3",
        )
        plot(f"Value: {name}", name, [one], "{}")
    plot("Learning rate", "learning rate", [series("learning rate", field_of("lr"), "s6")], "{}")
    plot("Gradient norm", "gradient norm", [series("gradient norm", field_of("grad_norm"), "s6")], "{}", steep=True)
    speed = series("tokens per second", field_of("tokens_per_second"), "s6")
    plot("Throughput", "tokens per second", [speed], "{}")
    if len(values) > MOST_VALUES:
        constants.append(("named values not drawn", str(len(values) - MOST_VALUES)))
    return Group(f"Player: {player}" if player else "", [one for one in plots if one], constants)


def _cost(run: RunRecord) -> list[Plot]:
    longest = max((stage.seconds for stage in run.stages if math.isfinite(stage.seconds)), default=0.0)
    unit, size = ("h", 3600.0) if longest >= 7200 else ("min", 60.0) if longest >= 180 else ("s", 1.0)
    times = [Bar(one.label, one.seconds / size, duration(one.seconds), one.reused) for one in run.stages]
    peaks = [Bar(one.label, one.peak_memory_mb, memory(one.peak_memory_mb), one.reused) for one in run.stages]
    plots = (
        bar_plot("c0", "Time per stage", f"time ({unit})", times),
        bar_plot("c1", "Peak memory per stage", "peak memory (MB)", peaks),
    )
    return [plot for plot in plots if plot]


def _machine(run: RunRecord) -> list[tuple[str, str]]:
    machine, git = run.machine, run.git
    devices = ", ".join(plain(one) for one in listed(machine.get("devices")))
    revision = text(git.get("revision"))[:12]
    facts = [
        ("Platform", text(machine.get("platform"))),
        ("Processor", text(machine.get("processor"))),
        ("Cores", text(machine.get("cores"))),
        (
            "Memory",
            f"{compact(number(machine['memory_gb']))} GB" if math.isfinite(number(machine.get("memory_gb"))) else "",
        ),
        ("Devices", devices),
        (
            "Git revision",
            f"{revision} with uncommitted changes" if revision and git.get("dirty") else revision,
        ),
    ]
    return [(label, value) for label, value in facts if value]
