"""Stages: the steps of a pipeline. Each reads earlier artifacts and writes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.base.files import read_json, seed_all, whole_folder, write_json
from stillhouse.base.monitor import MetricsFile
from stillhouse.core.artifact import Artifact, Saver, save_artifact

if TYPE_CHECKING:
    from stillhouse.core.run import Run


class Context:
    """What a stage works with: its folder, the run it belongs to, and where its figures go."""

    def __init__(self, run: Run, folder: Path, name: str, *, seed: int | str) -> None:
        self.run = run
        self.folder = folder
        self.name = name
        self.seed = seed_all(seed, name)
        self.metrics = MetricsFile(folder / "metrics.jsonl", run.trackers, name, active=run.main)
        self.results: dict[str, float] = {}
        self.facts: dict[str, Any] = {}

    @property
    def artifact_path(self) -> Path:
        return self.folder / "artifact"

    def save(self, value: Any, *, saver: Saver | None = None, files: Mapping[str, Any] | None = None) -> str:
        """Write the stage's artifact, whole or not at all; returns its kind. ``files``: more, as text or as JSON."""
        with whole_folder(self.artifact_path) as temporary:
            if saver is not None:
                saver(value, temporary)
                kind = "model"
            else:
                kind = save_artifact(value, temporary)
            for name, content in (files or {}).items():
                text = content if isinstance(content, str) else json.dumps(content, indent=1)
                (temporary / name).write_text(text, encoding="utf-8")
        return kind


class Stage:
    """Base of all stages.

    Args:
        name: names the stage's folder.
        cache: if given, what the result depends on besides the stage's name: the stage is then shared between runs,
            made once and kept in the cache folder (a teacher that many runs use).
    """

    kind = "Stage"

    def __init__(self, name: str, *, cache: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.cache = cache

    def execute(self, context: Context) -> str:
        """Do the work, save the artifact with ``context.save`` and return its kind."""
        raise NotImplementedError


class Function(Stage):
    """A stage that is one function: it gets the `Context` and returns what to save.

    The function may return a model, a `Table`, a data set, plain JSON values, or None after writing files with
    ``context.save``; or a pair of one of these and a dict of further files (text as it is, other values as JSON).
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Context], Any],
        *,
        save: Saver | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, cache=cache)
        self.function = function
        self.saver = save

    def execute(self, context: Context) -> str:
        value = self.function(context)
        value, files = value if isinstance(value, tuple) else (value, None)
        if not context.run.main:
            return "none"
        if value is None and files is None and context.artifact_path.exists():
            return "files"
        return context.save(value, saver=self.saver, files=files)


class Transform(Function):
    """Prune, merge, convert, reconstruct, condense, filter: a model or data set becomes another, without a loop."""

    kind = "Transform"


class Evaluate(Function):
    """Measure models; returns a `Table` as a rule."""

    kind = "Evaluate"


class Audit(Function):
    """A measurement that any run can take of a distilled model."""

    kind = "Audit"


class Generate(Stage):
    """A teacher (or a rule) writes records, one a request; the artifact is a Parquet data set.

    Args:
        requests: ``key -> request``; keys identify requests across restarts.
        write: makes the record (a flat dict) for a request, or returns None to drop it.
        together: ``write`` gets all requests that are left, by key, and yields ``(key, record)`` in any order: for
            teachers that answer several at a time.

    Every record is on disk as soon as it is made: after a kill nothing is asked twice and nothing is lost.
    """

    kind = "Generate"

    def __init__(
        self,
        name: str,
        requests: Mapping[str, Any] | Iterable[tuple[str, Any]],
        write: Callable[[Any], Any],
        *,
        together: bool = False,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, cache=cache)
        self.requests = dict(requests)
        self.write = write
        self.together = together

    def execute(self, context: Context) -> str:
        if not context.run.main:  # one process asks; the others wait for the artifact
            return "data"
        import pyarrow as pa
        import pyarrow.parquet as pq

        journal = MetricsFile(context.folder / "records.jsonl")
        done = {line["key"]: line["record"] for line in journal.read() if line["key"] in self.requests}
        journal.rewrite([{"key": key, "record": record} for key, record in done.items()])
        left = {key: request for key, request in self.requests.items() if key not in done}
        made = self.write(left) if self.together else ((key, self.write(left[key])) for key in left)
        with context.run.progress(self.name, len(self.requests), unit="records") as bar, closing(made):
            bar.update(len(done))
            for key, record in made:
                done[key] = record
                journal.append({"key": key, "record": record}, sync=True)
                bar.update(len(done))
        records = [{"key": key, **done[key]} for key in self.requests if done[key] is not None]
        names = dict.fromkeys(name for record in records for name in record)  # not every record has every field
        context.results = {"records": len(records), "dropped": len(done) - len(records)}
        with whole_folder(context.artifact_path) as temporary:
            columns = {name: [record.get(name) for record in records] for name in names}
            pq.write_table(pa.table(columns), temporary / "data.parquet")
        return "data"


def finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage, or None."""
    file = folder / "stage.json"
    if not file.exists():
        return None
    record = read_json(file)
    return record if record.get("status") == "done" else None


def artifact_of(folder: Path, record: Mapping[str, Any]) -> Artifact:
    """The artifact of a finished stage."""
    home = Path(record["cache"]) if record.get("cache") else folder
    return Artifact(
        home / "artifact", record["artifact"]["kind"], dict(record.get("metrics", {})), record["fingerprint"]
    )


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``stage.json``."""
    write_json(folder / "stage.json", dict(record))
