"""Running systems by name: what the command line does, as functions.

``run_system("taid", {"teacher": "my-model", "data": "my.txt"}, output="runs/x")`` is ``stillhouse run taid ...``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError, RunError, StillhouseError, suggest
from stillhouse.base.fields import check_fields, field_hints
from stillhouse.base.files import read_json
from stillhouse.core.artifact import Artifact
from stillhouse.core.engine import Engine
from stillhouse.core.run import Run
from stillhouse.core.stage import artifact_of, finished
from stillhouse.core.system import System, configure
from stillhouse.report import write_model_card, write_report
from stillhouse.systems import get_system


@dataclass(kw_only=True)
class RunOptions:
    """How a system is run, whatever it is."""

    output: Annotated[str | None, "the run's directory; by default runs/NAME-DATE"] = None
    accelerator: Annotated[str, "auto, cpu, cuda or mps"] = "auto"
    devices: Annotated[int, "processes on this machine; more than one: see `stillhouse launch`", Ge(1)] = 1
    nodes: Annotated[int, "machines", Ge(1)] = 1
    strategy: Annotated[Literal["auto", "ddp", "fsdp2", "deepspeed"], "how processes share the work"] = "auto"
    deepspeed: Annotated[str | None, "DeepSpeed's own configuration file; by default ZeRO stage 2"] = None
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"], "number format of the computation"
    ] = "32-true"
    trackers: Annotated[list[str], "tensorboard, wandb, mlflow, trackio"] = field(
        default_factory=lambda: ["tensorboard"]
    )
    checkpoint_minutes: Annotated[float, "minutes between checkpoints", Gt(0)] = 1.0

    def engine(self) -> Engine:
        names = ("accelerator", "devices", "nodes", "strategy", "deepspeed", "precision")
        return Engine(**{name: getattr(self, name) for name in names})


@dataclass
class Finished:
    """A finished run: its folder, the artifacts of its stages, and the report."""

    folder: Path
    artifacts: dict[str, Artifact]
    report: Path


def split_values(cls: type[System], values: Mapping[str, Any]) -> tuple[System, RunOptions]:
    """Sort values into the system's fields and the run's options; an unknown name is a `ConfigError`."""
    options, fields = field_hints(RunOptions), field_hints(cls)
    for name in values:
        if name not in options and name not in fields:
            raise ConfigError(f"{cls.name()} has no field {name!r}{suggest(name, [*fields, *options])}")
    chosen = check_fields(RunOptions, {k: v for k, v in values.items() if k in options}, owner="run")
    return configure(cls, {k: v for k, v in values.items() if k in fields}), RunOptions(**chosen)


def run_system(
    name: str,
    values: Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    quiet: bool = False,
    fresh: bool = False,
) -> Finished:
    """Run the system called ``name`` in the directory ``output``, or go on with the run that is there.

    ``values`` are fields of the system and options of the run (`RunOptions`), as numbers or as text.
    """
    system, options = split_values(get_system(name), values or {})
    run = Run(
        output,
        seed=system.seed,
        engine=options.engine(),
        trackers=options.trackers,
        checkpoint_minutes=options.checkpoint_minutes,
        quiet=quiet,
        fresh=fresh,
    )
    info = {"options": {**dataclasses.asdict(options), "output": str(output)}, "source": name}
    try:
        artifacts = run.execute(system, info=info)
    except BaseException:
        if run.record:  # it had begun: what there is so far can be looked at
            with contextlib.suppress(StillhouseError):
                write_report(run.folder)
        raise
    report = run.folder / "report.html"
    if run.main:
        _cards(run.folder, system)
        report = write_report(run.folder)
        for kind in vars(system).get("audits", ()):
            from stillhouse.audit import audit_run  # which reads runs too, and so stands above

            audit_run(run.folder, kind, quiet=quiet)
    return Finished(run.folder, artifacts, report)


def resume(folder: str | Path, *, quiet: bool = False) -> Finished:
    """Go on with the run in ``folder`` as it was configured."""
    record = run_record(Path(folder))
    if not record.get("source"):
        raise RunError(f"{folder} was not started from a named system; run the script that made it again")
    values = {name: record["config"][name] for name in record["explicit"]}
    options = {k: v for k, v in record["options"].items() if k != "output"}
    return run_system(record["source"], {**values, **options}, output=folder, quiet=quiet)


def run_record(folder: Path) -> dict[str, Any]:
    """The record of the run in ``folder``."""
    file = folder / "run.json"
    if not file.exists():
        raise RunError(f"{folder} is not a run: it has no run.json")
    return read_json(file)


def stage_artifacts(folder: Path) -> dict[str, Artifact]:
    """The artifacts of the finished stages of a run, by stage name."""
    found = {}
    for stage in sorted((folder / "stages").glob("*")):
        record = finished(stage)
        if record is not None:
            found[record["name"]] = artifact_of(stage, record)
    return found


def _cards(folder: Path, system: System) -> None:
    """Give every model of this run a card, and what the run was for an easy path: ``RUN/model`` or ``RUN/data``."""
    record = run_record(folder)
    config = record["config"]
    for name, artifact in stage_artifacts(folder).items():
        if folder not in artifact.path.parents:
            continue
        if any((artifact.path / file).exists() for file in ("config.json", "model_index.json")):
            teacher, dataset = config.get("teacher"), config.get("data")
            write_model_card(folder, artifact.path, teacher=teacher, dataset=dataset, figures=None)
        easy = folder / artifact.kind
        if name == system.product and artifact.kind in ("model", "data"):
            easy.unlink(missing_ok=True)  # of an earlier configuration
            easy.symlink_to(artifact.path.relative_to(folder), target_is_directory=True)
