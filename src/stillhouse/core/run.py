"""Runs: stages in order, in one directory, done once each and gone on with after a kill."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from platformdirs import user_cache_path

from stillhouse.base.errors import Interrupted, RunError, StillhouseError
from stillhouse.base.facts import digest, machine, revision, versions
from stillhouse.base.fields import field_help, field_hints
from stillhouse.base.files import locked, read_json, room_to_write, seed_all, sweep, write_json
from stillhouse.base.monitor import Bar, PeakMemory, Tracker, progress_bar, start_trackers
from stillhouse.core.artifact import Artifact
from stillhouse.core.engine import Engine
from stillhouse.core.stage import Context, Stage, artifact_of, finished, write_record
from stillhouse.core.system import System


def cache_folder() -> Path:
    """Where stages shared between runs are kept: ``STILLHOUSE_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("STILLHOUSE_CACHE") or user_cache_path("stillhouse"))


class Run:
    """One execution of a pipeline in one directory.

    Args:
        folder: the run's directory; made if missing. A run found there goes on.
        seed: fixes every random choice.
        engine: devices, strategy, precision.
        trackers: names of trackers besides ``metrics.jsonl``.
        checkpoint_minutes: minutes between checkpoints of training stages.
        quiet: no progress.
        fresh: forget what an earlier run left in ``folder``.

    ``run.execute(system_or_stages)`` does the stages in order and returns their artifacts by name. A stage that is
    done is not done again unless a field that it read, or a stage before it, has changed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        engine: Engine | None = None,
        trackers: Sequence[str] = (),
        checkpoint_minutes: float = 1.0,
        quiet: bool = False,
        fresh: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self.engine = engine or Engine()
        self.tracker_names = tuple(trackers)
        self.trackers: list[Tracker] = []
        self.checkpoint_minutes = checkpoint_minutes
        self.quiet = quiet
        self.fresh = fresh
        self.record: dict[str, Any] = {}

    @cached_property
    def fabric(self) -> Fabric:
        return self.engine.fabric()

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.fabric.global_rank == 0

    def progress(self, name: str, total: int, *, unit: str = "steps") -> AbstractContextManager[Bar]:
        """A progress bar for a piece of work."""
        return progress_bar(name, total, unit=unit, quiet=self.quiet or not self.main)

    def say(self, message: str) -> None:
        """Tell the user something, unless the run is quiet."""
        if not self.quiet and self.main:
            print(message, file=sys.stderr, flush=True)

    # -- executing --------------------------------------------------------------------------------------------------

    def execute(self, work: System | Iterable[Stage], *, info: Mapping[str, Any] | None = None) -> dict[str, Artifact]:
        """Do all stages; returns ``stage name -> Artifact``. Raises `RunError` if the run is in use or cannot go on."""

        def refuse() -> None:
            raise RunError(f"{self.folder} is in use by another process; wait for it or choose another output")

        with self._locked(self.folder / ".lock", refuse), room_to_write(self.folder):
            self._begin(work, info or {})
            try:
                artifacts = self._stages(work)
            except BaseException as error:
                known = isinstance(error, StillhouseError)
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                with contextlib.suppress(RunError):  # a full disk must not hide what went wrong
                    self._end(
                        "stopped" if stopped else "failed",
                        error=None if stopped else str(error) if known else f"{type(error).__name__}: {error}",
                    )
                raise
            self._end("done")
        return artifacts

    def _stages(self, work: System | Iterable[Stage]) -> dict[str, Artifact]:
        system = work if isinstance(work, System) else None
        stages = system.stages(self) if system is not None else iter(work)
        artifacts: dict[str, Artifact] = {}
        chain = digest("seed", self.seed)
        sent: Artifact | None = None
        folders: list[str] = []
        while True:
            seed_all(self.seed, "between stages", len(folders))
            try:
                stage = stages.send(sent) if sent is not None and hasattr(stages, "send") else next(stages)
            except StopIteration:
                break
            if stage.name in artifacts:
                raise RunError(f"two stages of this run are called {stage.name!r}; give each its own name")
            folders.append(f"{len(folders) + 1:02d}-{stage.name}")
            self._note(stages=folders)
            sent = self._stage(stage, self.folder / "stages" / folders[-1], chain, system)
            chain = sent.fingerprint
            artifacts[stage.name] = sent
        if self.main:
            for left in (self.folder / "stages").glob("*"):
                if left.name not in folders:
                    shutil.rmtree(left, ignore_errors=True)
        return artifacts

    def _stage(self, stage: Stage, folder: Path, upstream: str, system: System | None) -> Artifact:
        config = system.config() if system is not None else {}
        read = system.__dict__["read"] if system is not None else set()
        record = finished(folder)
        if record is not None and self._still_holds(record, stage, upstream, config, read):
            self.say(f"{stage.name}: done already")
            read.update(record["fields"])
            if self.main:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a process killed in this very moment
            return artifact_of(folder, record)
        if stage.cache is not None:
            return self._cached_stage(stage, folder, upstream, config, read)
        plan = {"kind": stage.kind, "upstream": upstream, "config": config}
        self._clear_unless(folder, plan)
        return self._do(stage, folder, upstream, config, read, plan)

    def _still_holds(
        self,
        record: Mapping[str, Any],
        stage: Stage,
        upstream: str,
        config: Mapping[str, Any],
        read: set[str],
    ) -> bool:
        fields = record["fields"]
        same_kind = record["kind"] == stage.kind and record["upstream"] == upstream
        same_fields = all(name in config and config[name] == value for name, value in fields.items())
        artifact = artifact_of(Path(), record).path
        there = not record.get("cache") or artifact.exists()
        if stage.cache is not None:
            return same_kind and there and record["fingerprint"] == digest(stage.kind, stage.name, stage.cache)
        return same_kind and same_fields and there and read <= set(fields)

    def _cached_stage(
        self, stage: Stage, folder: Path, upstream: str, config: Mapping[str, Any], read: set[str]
    ) -> Artifact:
        fingerprint = digest(stage.kind, stage.name, stage.cache)
        home = cache_folder() / f"{stage.name}-{fingerprint}"

        def wait() -> None:
            self.say(f"{stage.name}: another process is making it; waiting")

        with self._locked(home.with_name(f"{home.name}.lock"), wait):
            record = self.fabric.broadcast(finished(home) if self.main else None)
            reused = record is not None
            if record is None:
                sweep(home)
                plan = {"kind": stage.kind, "upstream": "", "config": dict(stage.cache or {})}
                self._clear_unless(home, plan)
                self._do(stage, home, "", dict(stage.cache or {}), set(), plan, fingerprint=fingerprint)
                record = finished(home)
            else:
                self.say(f"{stage.name}: taken from the cache ({home})")
        self.fabric.barrier()
        record = record or finished(home)
        assert record is not None
        linked = {**record, "cache": str(home), "reused": reused, "upstream": upstream}
        linked["fields"] = {name: config[name] for name in read}
        if self.main:
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, linked)
        return artifact_of(folder, linked)

    def _clear_unless(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Keep what a killed attempt at the same stage left; clear what belongs to another configuration."""
        if not self.main:
            self.fabric.barrier()
            return
        begun = folder / "stage.json"
        same = begun.exists() and read_json(begun).get("plan") == json.loads(json.dumps(plan, default=str))
        if not same or self.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.fabric.barrier()

    def _do(
        self,
        stage: Stage,
        folder: Path,
        upstream: str,
        config: Mapping[str, Any],
        read: set[str],
        plan: Mapping[str, Any],
        *,
        fingerprint: str | None = None,
    ) -> Artifact:
        record: dict[str, Any] = {
            "name": stage.name,
            "kind": stage.kind,
            "status": "running",
            "upstream": upstream,
            "plan": dict(plan),
            "started": _now(),
        }
        if self.main:
            write_record(folder, record)
        begun, memory = time.monotonic(), PeakMemory()
        context = Context(self, folder, stage.name, seed=fingerprint or self.seed)
        kind = stage.execute(context)
        fields = {name: config[name] for name in read if name in config}
        record |= {
            "status": "done",
            "fields": fields,
            "fingerprint": fingerprint or digest(stage.kind, stage.name, fields, upstream),
            "seconds": time.monotonic() - begun,
            "peak_memory_mb": memory.mebibytes(),
            "metrics": context.results,
            "artifact": {"kind": kind, "path": "artifact"},
            **context.facts,
        }
        if self.main:
            write_record(folder, record)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.fabric.barrier()
        return artifact_of(folder, record)

    # -- the run's own record ---------------------------------------------------------------------------------------

    def _locked(self, file: Path, busy: Callable[[], None]) -> AbstractContextManager[None]:
        return locked(file, busy) if self.main else contextlib.nullcontext()

    def _begin(self, work: System | Iterable[Stage], info: Mapping[str, Any]) -> None:
        if not self.main:
            return
        file = self.folder / "run.json"
        sweep(self.folder)
        if self.fresh:
            shutil.rmtree(self.folder / "stages", ignore_errors=True)
        earlier = read_json(file) if file.exists() and not self.fresh else {}
        self.record = {
            "name": self.folder.name,
            "system": "",
            "title": "",
            "citation": "",
            "card": None,
            "config": {},
            "explicit": [],
            "demo": [],
            "fields": {},
            **(describe(work) if isinstance(work, System) else {}),
            **info,
            "status": "running",
            "error": None,
            "seed": self.seed,
            "created": earlier.get("created", _now()),
            "seconds": earlier.get("seconds", 0.0),
            "engine": {name: value for name, value in vars(self.engine).items() if not callable(value)},
            "versions": versions(),
            "machine": machine(),
            "git": revision(),
            "argv": sys.argv,
            "stages": [],
        }
        self._begun = time.monotonic() - self.record["seconds"]
        self.trackers = start_trackers(self.tracker_names, self.folder, self.folder.name, self.record["config"])
        write_json(file, self.record)

    def _note(self, **changes: Any) -> None:
        if self.main:
            self.record |= changes
            self.record["seconds"] = time.monotonic() - self._begun
            write_json(self.folder / "run.json", self.record)

    def _end(self, status: str, *, error: str | None = None) -> None:
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        self._note(status=status, error=error, finished=_now())


def describe(system: System) -> dict[str, Any]:
    """What a run's record says of its system."""
    hints = field_hints(type(system))
    return {
        "system": system.name(),
        "title": system.meta.title,
        "citation": system.meta.citation,
        "card": system.meta.card,
        "config": system.config(),
        "explicit": sorted(system.__dict__["explicit"]),
        "demo": sorted(set(type(system).demo) - system.__dict__["explicit"]) if system.is_demo() else [],
        "fields": {name: field_help(hint) for name, hint in hints.items()},
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
