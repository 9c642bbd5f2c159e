"""What a run shows and keeps while it works: progress with ETA, ``metrics.jsonl``, trackers, peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.base.files import whole_file


class Tracker(Protocol):
    """Where scalars go besides ``metrics.jsonl``."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files that ``tensorboard --logdir`` opens."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"- {key}: {value}" for key, value in config.items()))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; needs ``pip install wandb``."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="stillhouse", name=run, dir=str(folder), config=dict(config), id=run, resume="allow"
        )

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio(WeightsAndBiases):
    """trackio; needs ``pip install trackio``."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(project="stillhouse", name=run, config=dict(config), resume="allow")


class MLflow:
    """MLflow, at ``MLFLOW_TRACKING_URI`` or in the run's folder; needs ``pip install mlflow``."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any]) -> None:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_experiment("stillhouse")
        self._mlflow = mlflow
        mlflow.start_run(run_name=run)
        mlflow.log_params({key: str(value)[:500] for key, value in config.items()})

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def start_trackers(names: Sequence[str], folder: Path, run: str, config: Mapping[str, Any]) -> list[Tracker]:
    """Start the trackers called ``names``; one that is unknown or not installed is a `ConfigError`."""
    started: list[Tracker] = []
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"trackers: there is no {name!r}{suggest(name, TRACKERS)}")
        try:
            started.append(TRACKERS[name](folder, run, config))
        except ImportError as error:
            raise ConfigError(f"trackers: {name} is not installed ({error}); pip install {name}") from error
    return started


class MetricsFile:
    """Append-only JSON lines; a half-written last line is dropped on reading."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = (), stage: str = "", *, active: bool = True) -> None:
        self.path = path
        self.trackers = trackers
        self.stage = stage
        self.active = active

    def append(self, record: Mapping[str, Any], *, sync: bool = False) -> None:
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
            handle.flush()
            if sync:
                os.fsync(handle.fileno())

    def track(self, scalars: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log({f"{self.stage}/{name}": value for name, value in scalars.items()}, step)

    def read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the content: what a killed run wrote after its last checkpoint goes."""
        if self.active:
            with whole_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


class Bar:
    """Progress of one stage: a live bar with ETA on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, total: int, unit: str, update: Any, quiet: bool, every: float) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._update, self._quiet, self._every = update, quiet, every
        self._begun = self._shown = time.monotonic()
        self._first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        if self._update is not None:
            self._update(completed=done, note=note)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if self._quiet or (now - self._shown < self._every and done < self._total):
            return
        self._shown = now
        rate = (done - self._first) / max(1e-9, now - self._begun)
        left = f", {_clock((self._total - done) / rate)} left" if rate > 0 and done < self._total else ""
        print(f"{self._name}: {done}/{self._total} {self._unit}{left}  {note}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(
    name: str, total: int, *, unit: str = "steps", quiet: bool = False, every: float = 10.0
) -> Iterator[Bar]:
    """A `Bar` for a stage of ``total`` units."""
    if quiet or not sys.stderr.isatty():
        yield Bar(name, total, unit, None, quiet, every)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
    ]
    columns += [
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, note="")
        yield Bar(name, total, unit, lambda **fields: progress.update(task, **fields), quiet, every)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class PeakMemory:
    """Peak memory since construction, in MiB: of the GPU if one is used, else of this process."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark afresh

    def mebibytes(self) -> float:
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return torch.cuda.max_memory_allocated() / 2**20
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM instead of dying of it, so that a loop can save; a second one kills."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def _note(self, _number: int, _frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __enter__(self) -> StopRequest:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's business
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[int(number)] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
