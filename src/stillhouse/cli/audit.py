"""``stillhouse audit``: measurements added to a run and to its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory; finished or not.")],
    kind: Annotated[str, typer.Argument(metavar="KIND", help="hacking, fidelity or memorisation.")],
    values: Annotated[list[str] | None, typer.Argument(metavar="FIELD=VALUE...", help="Options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a run's language models, and write its report again with the figures in it."""
    from stillhouse.audit import audit_run
    from stillhouse.cli.main import _show_result
    from stillhouse.cli.recipe import parse_overrides

    taken = audit_run(folder, kind, parse_overrides(list(values or [])), quiet=quiet)
    if as_json:
        print(json.dumps(taken.artifacts[kind].table().to_json(), indent=1))
        return
    _show_result(taken)
