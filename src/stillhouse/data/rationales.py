"""Chain-of-thought prompts, and the rationale and label in what comes back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_PHRASE = "So the answer is"
_PHRASE = re.compile(r"(?:\b(?:so|thus|hence|therefore),?\s+)?\b(?:the|my)\s+(?:final\s+)?answer\s+is\b\s*:?", re.I)
_NEXT = re.compile(r"\n\s*(?:Q|Question|Input)\s*:", re.I)


@dataclass(frozen=True)
class Example:
    """An input with its label and the reason for it; either may be missing."""

    input: str
    label: str | None = None
    rationale: str = ""


def cot_prompt(exemplars: Sequence[Example], question: str, *, instruction: str = "") -> str:
    """A few-shot chain-of-thought prompt (Wei et al., 2022, arXiv 2201.11903).

    Each exemplar is ``Q: input``, ``A: rationale So the answer is label.``; the question follows with an open ``A:``.
    """
    shown = [f"Q: {e.input}\nA: {e.rationale} {ANSWER_PHRASE} {e.label}." for e in exemplars]
    return "\n\n".join([*([instruction] if instruction else []), *shown, f"Q: {question}\nA:"])


def parse_cot(text: str) -> tuple[str, str] | None:
    """``(rationale, label)`` of an answer in that form, or None if it has no label.

    The last answer phrase counts; what a base model writes on as a further question does not. The label is the rest of
    the phrase's line, without a full stop or marks around it.
    """
    own = _NEXT.split(text, maxsplit=1)[0]
    phrase = None
    for phrase in _PHRASE.finditer(own):  # noqa: B007
        pass
    if phrase is None:
        return None
    lines = own[phrase.end() :].strip().splitlines()
    label = lines[0].strip(" \t*_`\"'").removesuffix(".").strip(" \t*_`\"'") if lines else ""
    rationale = own[: phrase.start()].strip().removeprefix("A:").strip()
    return (rationale, label) if label else None
