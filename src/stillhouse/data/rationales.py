"""Chain-of-thought prompts, the rationale and label in what comes back, and rationales that are spoilt on purpose."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


Noise = Literal["noisy", "shuffled", "wrong"]


def spoilt(
    rationales: Sequence[str], labels: Sequence[str], kind: Noise, *, share: float, seed: int | str = 0
) -> list[str]:
    """Rationales as a worse teacher might have written them; the labels stay as they are.

    - ``noisy``: each word is, with chance ``share``, the word at its place in another rationale;
    - ``shuffled``: each rationale is, with that chance, another example's;
    - ``wrong``: each rationale is, with that chance, one that argues for another label.

    Empty rationales stay empty and are nobody's; what has nothing to be replaced by stays. Replacements are drawn with
    replacement, so a word may be replaced by its like.
    """
    draw = random.Random(f"{kind} {seed}")
    filled = [place for place, text in enumerate(rationales) if text]
    words = {place: rationales[place].split() for place in filled}
    found = list(rationales)
    for place in filled:
        if kind == "noisy":
            own = list(words[place])
            for position in range(len(own)):
                other = words[draw.choice(filled)]
                if draw.random() < share and position < len(other):
                    own[position] = other[position]
            found[place] = " ".join(own)
        elif draw.random() < share:
            others = [o for o in filled if o != place and (kind == "shuffled" or labels[o] != labels[place])]
            found[place] = rationales[draw.choice(others)] if others else rationales[place]
    return found
