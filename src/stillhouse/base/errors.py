"""Errors a user can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class StillhouseError(Exception):
    """Something the user can put right; the command line prints it as one line and exits with code 2."""


class ConfigError(StillhouseError):
    """A system, field or value that is not allowed."""


class DataError(StillhouseError):
    """A data file, record or data set that cannot be used."""


class ModelError(StillhouseError):
    """A model, tokenizer or checkpoint that cannot be used."""


class RunError(StillhouseError):
    """A run directory that cannot be used, or a run that cannot go on."""


class Diverged(RunError):
    """A loss or a weight became infinite or no number at all."""


class Interrupted(RunError):
    """The user or the scheduler asked the run to stop; its state is saved."""


def suggest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Say which of the ``known`` names are nearest to ``name``: ``"; did you mean 'x'?"`` or the first few."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {shown}"


def one_line(error: BaseException) -> str:
    """What an exception says, short and on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")


def near(path: Path) -> str:
    """Names beside ``path`` that are nearly its own, as the end of a message; empty if there are none."""
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, ["demo", *beside])
    return suggest(path.name, close) if close else ""
