"""Runs a system's own generator and looks at each of its stages when it is yielded, before it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stillhouse import Run
from stillhouse.core.artifact import Artifact
from stillhouse.core.stage import Stage
from stillhouse.core.system import System


def watched(
    system: System,
    folder: Path,
    look: Callable[[Any, dict[str, Artifact]], None] = lambda stage, left: None,
    *,
    until: str = "",
) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """(stages, what they left) by name.

    Args:
        look: gets every stage as it is yielded, and what the stages before it left.
        until: the stage of this name is looked at, and neither it nor what follows is done.
    """
    run, seen = Run(folder, quiet=True), {}
    left: dict[str, Artifact] = {}

    def through() -> Iterator[Stage]:
        stages: Any = system.stages(run)
        sent: Any = None
        while True:
            try:
                stage = stages.send(sent)
            except StopIteration:
                return
            seen[stage.name] = stage
            look(stage, left)
            if stage.name == until:
                return
            sent = left[stage.name] = yield stage

    run.execute(through())
    return seen, left
