"""Tables of figures: what evaluations leave, and what reports and the command line show."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of a `Table`: ``format`` is a Python format spec, ``better`` says which direction is good."""

    key: str
    label: str
    format: str = ""
    better: str | None = None
    help: str = ""


@dataclass
class Table:
    """A table of figures: one row a model, say. ``rows`` hold ``name`` and the columns' keys."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["name"] == name)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Table:
        return Table(value["title"], [Column(**c) for c in value["columns"]], value["rows"], value.get("notes", []))

    def cells(self, row: dict[str, Any]) -> list[str]:
        """The row as text, one cell a column."""
        texts = []
        for column in self.columns:
            value = row.get(column.key)
            missing = value is None or (isinstance(value, float) and not math.isfinite(value))
            texts.append("–" if missing else format(value, column.format))
        return texts
