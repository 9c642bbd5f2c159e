"""Values as words: numbers, durations, commands, and what must not be shown."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from stillhouse.report.figures import compact

_FORMAT = re.compile(r"[+ ]?[,_]?(\.\d{1,2})?[bdeEfFgGn%]?")  # no widths: they could ask for gigabytes
_SECRET_FIELD = re.compile(
    r"(^|[_.-])(api[_-]?key|secret[_-]?key|client[_-]?secret|password|passwd|credentials?|"
    r"(access|auth|api|bearer|hf)[_-]?token)$",
    re.IGNORECASE,
)
_SECRETS = (
    (re.compile(r"\b(hf_|sk-|ghp_|gho_|glpat-)[A-Za-z0-9_-]{12,}"), r"\1(hidden)"),
    (re.compile(r"(://)[^\s/:@]+:[^\s/@]+@"), r"\1(hidden)@"),
)


def number(value: Any) -> float:
    """``value`` as a float; NaN for whatever is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def show(value: Any, format_spec: str = "") -> str:
    """A result for people: by its own format if that fits, else compactly; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text(value) if isinstance(value, str) else plain(value)
    if not math.isfinite(number(value)):
        return compact(number(value))
    if format_spec and _FORMAT.fullmatch(format_spec):
        whole = format_spec[-1] in "bdn" and isinstance(value, float) and value.is_integer()
        try:
            return format(int(value) if whole else value, format_spec).replace("-", "−")
        except (ValueError, OverflowError):
            pass
    return compact(number(value))


def plain(value: Any) -> str:
    """A configuration value as it would be typed: strings bare, the rest as JSON."""
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """``850 ms``, ``12.3 s``, ``3 min 20 s``, ``1 h 05 min``; a dash if unknown."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def memory(megabytes: float) -> str:
    if not math.isfinite(megabytes) or megabytes < 0:
        return "–"
    return f"{megabytes / 1024:.2f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def when(stamp: Any) -> str:
    """An ISO time as a date people read; whatever else it holds, unchanged."""
    try:
        moment = datetime.fromisoformat(text(stamp))
    except ValueError:
        return text(stamp)
    zone = f" {moment:%Z}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def hide_secrets(message: str) -> str:
    """``message`` without access tokens and passwords in addresses."""
    for pattern, instead in _SECRETS:
        message = pattern.sub(instead, message)
    return message


def hide_field(name: str, value: Any) -> Any:
    """A configuration value that may be shown: the report travels, credentials must not."""
    if isinstance(value, dict):
        return {key: hide_field(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_field(name, inner) for inner in value]
    if isinstance(value, str):
        return "(hidden)" if value and _SECRET_FIELD.search(name) else hide_secrets(value)
    return value


def hide_arguments(argv: Sequence[str]) -> list[str]:
    """A command line that may be shown."""
    shown, hide_next = [], False
    for word in argv:
        name, equals, value = word.partition("=")
        secret = bool(_SECRET_FIELD.search(name.lstrip("-")))
        if hide_next:
            shown.append("(hidden)")
        elif secret and equals:
            shown.append(f"{name}=(hidden)" if value else word)
        else:
            shown.append(hide_secrets(word))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def command_line(argv: Sequence[str]) -> str:
    """``argv`` as it is typed, with the program's folder left away."""
    return shlex.join([Path(argv[0]).name, *argv[1:]]) if argv else ""
