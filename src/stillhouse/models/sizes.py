"""Sizes of models as people write them: 350M, 1.1B, 7e9."""

from __future__ import annotations

import re

from stillhouse.base.errors import ModelError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
SIZE = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmbt]?)", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether ``text`` is a number of parameters."""
    return SIZE.fullmatch(text.strip().replace("_", "")) is not None


def parse_size(text: str) -> float:
    """The number of parameters that ``text`` says.

    Raises:
        ModelError: it is not a size, or zero.
    """
    found = SIZE.fullmatch(text.strip().replace("_", ""))
    value = float(found[1]) * UNITS[found[2].lower()] if found else 0.0
    if not value:
        raise ModelError(f"{text!r} is not a number of parameters; write 350M, 1.1B or 7e9")
    return value


def format_size(value: float) -> str:
    """``value`` in the largest unit that leaves at least 1: 1.10B."""
    unit, factor = next(((u, f) for u, f in reversed(UNITS.items()) if value >= f), ("", 1.0))
    return f"{value / factor:.3g}{unit.upper()}"
