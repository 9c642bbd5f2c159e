"""Verifiers: how right a response is, decided by rules.

A verifier is called with the response's text and the problem's record, and gives a `Judgement`, or plainly a number
or a bool. `judged` brings all of these into one form, so any Python function can be one.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from stillhouse.base.errors import ConfigError, one_line

Record = Mapping[str, Any]
Verifier = Callable[[str, Record], Any]

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?%?")


@dataclass(frozen=True)
class Judgement:
    """A reward between 0 (wrong) and 1 (right), and what the verifier has to say about the response, if anything."""

    reward: float
    feedback: str = ""

    @property
    def correct(self) -> bool:
        """A reward of at least one half counts as correct."""
        return self.reward >= 0.5


def judged(verifier: Verifier, text: str, record: Record) -> Judgement:
    """What ``verifier`` says, as a `Judgement`; it may return one, a number, a bool, or (number, feedback)."""
    said = verifier(text, record)
    if isinstance(said, Judgement):
        return said
    reward, feedback = said if isinstance(said, tuple) and len(said) == 2 else (said, "")
    if not isinstance(reward, int | float) or reward != reward:
        raise ConfigError(f"the verifier returned {said!r:.60}; it must return a number, a bool, or (number, feedback)")
    return Judgement(float(reward), str(feedback))


def final_answer(text: str, marker: str = "#") -> str | None:
    r"""What follows the last ``marker``, or stands in the last ``\boxed{}``; None if there is neither."""
    if marker and marker in text:
        return text.rpartition(marker)[2].strip()
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for place, sign in enumerate(text[start + 6 :]):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[start + 7 : start + 6 + place].strip()
    return None


@dataclass(frozen=True)
class ExactMatch:
    """The final answer is the record's, letter by letter, blanks and (by default) upper case aside."""

    marker: str = "#"
    field: str = "answer"
    ignore_case: bool = True

    def __call__(self, text: str, record: Record) -> Judgement:
        answer = final_answer(text, self.marker)
        said, wanted = (" ".join(str(t).split()) for t in (text if answer is None else answer, record[self.field]))
        if self.ignore_case:
            said, wanted = said.lower(), wanted.lower()
        return Judgement(float(said == wanted))


@dataclass(frozen=True)
class Numeric:
    """The final answer's last number equals the record's: exactly, as a fraction, or to a relative ``tolerance``."""

    marker: str = "#"
    field: str = "answer"
    tolerance: float = 0.0

    def __call__(self, text: str, record: Record) -> Judgement:
        answer = final_answer(text, self.marker)
        said, wanted = last_number(text if answer is None else answer), last_number(str(record[self.field]))
        if wanted is None:
            raise ConfigError(f"the numeric verifier finds no number in the answer {record[self.field]!r:.60}")
        if said is None:
            return Judgement(0.0)
        return Judgement(float(abs(said - wanted) <= Fraction(self.tolerance) * abs(wanted)))


def last_number(text: str) -> Fraction | None:
    """The last number in a text: 1,234.5, -3, 2/3, 5e-2, 40%; None if there is none."""
    for found in reversed([m.group() for m in NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]):
        plain = found.replace(",", "").replace(" ", "")
        number, _, below = plain.rstrip("%").partition("/")
        try:
            value = Fraction(number) / (Fraction(below) if below else 1)
        except (ValueError, ZeroDivisionError):
            continue
        return value / 100 if plain.endswith("%") else value
    return None


@dataclass(frozen=True)
class AllOf:
    """Right only where every verifier says so (a rule and a judge, say): the least reward, and all feedback."""

    verifiers: tuple[Verifier, ...]

    def __call__(self, text: str, record: Record) -> Judgement:
        said = [judged(verifier, text, record) for verifier in self.verifiers]
        return Judgement(min(one.reward for one in said), "\n".join(one.feedback for one in said if one.feedback))


def verifier_named(name: str, *, marker: str = "#") -> Verifier:
    """A verifier from what a user types: ``exact``, ``numeric``, ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``; several
    joined by ``+`` must all agree.

    The file or module is run as any other Python code of the user's: name only what you trust.

    Raises:
        ConfigError: nothing of that name.
    """
    if "+" in name:
        return AllOf(tuple(verifier_named(part.strip(), marker=marker) for part in name.split("+")))
    if name in ("exact", "numeric"):
        return ExactMatch(marker=marker) if name == "exact" else Numeric(marker=marker)
    place, colon, function = name.rpartition(":")
    if not colon:
        raise ConfigError(f"verifier={name!r} is not known; use exact, numeric, FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except Exception as error:
        raise ConfigError(f"verifier={name!r} cannot be loaded: {one_line(error)}") from error
