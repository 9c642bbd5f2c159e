"""Objects of JSON-lines files, with the place each stands in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.base.errors import DataError, near, one_line


def json_lines(source: str | Path, *, like: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for every line of a .jsonl file that is not blank; messages about an object begin with its place.

    Args:
        like: how a line looks, for messages.

    Raises:
        DataError: no such file, not UTF-8, or a line that is not a JSON object.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"{source}: no such file{near(path)}; give a .jsonl file with lines such as {like}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other ends of a line may stand in a JSON string
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read ({one_line(error)}); give UTF-8 .jsonl") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({one_line(error)}); write one object a line") from error
        if not isinstance(found, dict):
            raise DataError(f"{place}: must be an object such as {like}")
        yield place, found
