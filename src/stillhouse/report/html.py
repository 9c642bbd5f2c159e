"""A run written down as one self-contained page."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from stillhouse.base.files import whole_file
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
from stillhouse.report.record import RunRecord, StageRecord, read_run
from stillhouse.report.wording import command_line, duration, listed, mapping, memory, number, plain, show, text, when

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


# Drawing is most of the work, and every audit of a run writes its page again.
_line_plot = functools.lru_cache(200)(line_plot)
_reliability_plot = functools.lru_cache(200)(reliability_plot)


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html``: one file, no network, readable without JavaScript.

    The page depends on nothing but the run directory: writing it twice gives the same bytes.

    Raises:
        RunError: ``run_dir`` holds no readable ``run.json``, or the page cannot be written.
    """
    run = read_run(run_dir)
    page = run.path / "report.html"
    with whole_file(page) as temporary:
        temporary.write_text(render(run), encoding="utf-8", errors="replace")
    return page


def render(run: RunRecord) -> str:
    """The page of a run."""
    script = THEME_SCRIPT.strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    trained = [stage for stage in run.stages if stage.train or stage.evals]
    plotted = _spread(trained, MOST_PLOTTED_STAGES)
    looks = _looks(trained)
    samples = [sample for stage in run.stages for sample in _samples(stage)]
    return _template().render(
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
        pictures=[
            (f"{stage.label}: {name}", base64.b64encode(content).decode())
            for stage in run.stages
            for name, content in stage.pictures.items()
        ],
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


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(lambda name: files("stillhouse.report").joinpath(name).read_text("utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"duration": duration, "memory": memory, "compact": compact, "plain": plain}
    return environment.get_template("report.html.j2")


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
    line = "It may still be going, or it may have been killed; the page shows what was on disk."
    if run.status == "stopped":
        line = f"It was stopped and saved; go on with: stillhouse resume {run.path}"
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
            plots.append(_reliability_plot(f"r{len(plots)}", name, tuple(bins), number(mapping(about).get("ece"))))
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
        one = Series(name, tuple(x for x, _ in points), tuple(y for _, y in points))
        if len(points) == 1:
            constants.append((f"{name} at step {compact(points[0][0])}, evaluated once", compact(points[0][1])))
        else:
            plots.append(_line_plot(f"{prefix}e{index}", f"Evaluation: {name}", name, (one,), steep=True, markers=True))
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
        return Series(name, tuple(x for x, _ in points), tuple(y for _, y in points), color, dash, width)

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
                _line_plot(
                    f"{prefix}f{len(plots)}", title, ylabel, tuple(many), unit_interval=unit_interval, steep=steep
                )
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
