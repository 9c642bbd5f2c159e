"""Runs as they lie on disk: the options they were started with, their records, and the artifacts of their stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError, RunError, suggest
from stillhouse.base.fields import check_fields, field_hints
from stillhouse.base.files import read_json
from stillhouse.core.artifact import Artifact
from stillhouse.core.engine import Engine
from stillhouse.core.stage import artifact_of, finished
from stillhouse.core.system import System, configure


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
