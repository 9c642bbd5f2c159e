"""Running systems by name: what the command line does, as functions.

``run_system("taid", {"teacher": "my-model", "data": "my.txt"}, output="runs/x")`` is ``stillhouse run taid ...``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.audit import audit_run
from stillhouse.base.errors import RunError, StillhouseError
from stillhouse.core.run import Run
from stillhouse.core.system import System
from stillhouse.report import write_model_card, write_report
from stillhouse.runs import Finished, run_record, split_values, stage_artifacts
from stillhouse.systems import get_system


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
