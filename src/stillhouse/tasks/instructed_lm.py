"""What the embedded models of instructed systems learn: a teacher that answers and writes problems, a beginner.

The instructions are the very templates that any teacher is asked with, in miniature.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

from stillhouse.data.elicited import Form
from stillhouse.data.reasoning import FORMS, ArithmeticChain, KnightsAndKnaves, Puzzle
from stillhouse.data.responses import filled
from stillhouse.tasks.reasoning import Corpus

Kind = Literal["answer", "expansion", "curation"]


@dataclass(frozen=True, kw_only=True)
class InstructedCorpus(Corpus):
    """Problems of several sizes: half of them are to be answered, the others to be written.

    Args:
        answer, expansion, curation, example_form: the templates that a teacher is asked with.
        demonstrations: how many problems a request for a new one shows.
    """

    answer: str
    expansion: str
    curation: str
    example_form: str
    demonstrations: int

    def example(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> tuple[str, str]:
        return self._asked(_drawn(rng), puzzle, rng, without)

    def examples(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> list[tuple[str, str]]:
        # One instruction a batch: they differ in length, and padding costs as much as text.
        kind = _drawn(rng)
        return [self._asked(kind, puzzle, rng, without) for _ in range(self.batch_size)]

    def _asked(self, kind: Kind, puzzle: Puzzle, rng: random.Random, without: set[str]) -> tuple[str, str]:
        sized, form = one_size(puzzle, rng), Form(self.example_form, "()()")
        count = 1 + self.demonstrations * (kind == "expansion")
        pair, *shown = (Corpus.example(self, sized, rng, without) for _ in range(count))
        if kind == "answer":
            return filled(self.answer, prompt=pair[0], marker=form.marker), pair[1]
        if kind == "expansion":
            asked = filled(self.expansion, demonstrations=form.shown(shown), marker=form.marker)
        else:
            asked = filled(self.curation, topic=topic_of(sized, pair[0]), marker=form.marker)
        return asked, form.shown([pair])


def _drawn(rng: random.Random) -> Kind:
    return rng.choice(("answer", "answer", "expansion", "curation"))


@dataclass(frozen=True, kw_only=True)
class BeginnerCorpus(Corpus):
    """Problems of its own size and easier ones, in the tokens of a ``teacher`` of more: the embedded student's text."""

    teacher: InstructedCorpus
    short: float = 0.5

    def spoken(self) -> Corpus:
        return self.teacher


def one_size(puzzle: Puzzle, rng: random.Random) -> Puzzle:
    """The puzzle at its own size (half of the time) or a smaller one."""
    if isinstance(puzzle, ArithmeticChain):
        least = min(3, puzzle.operands)
        return puzzle if rng.random() < 0.5 else replace(puzzle, operands=rng.randint(least, puzzle.operands))
    assert isinstance(puzzle, KnightsAndKnaves)
    return puzzle if rng.random() < 0.5 else replace(puzzle, people=max(2, puzzle.people - 1))


def topic_of(puzzle: Puzzle, prompt: str) -> str:
    """What a problem is about: how many numbers and the first of them, or how many people and what the first says."""
    if isinstance(puzzle, ArithmeticChain):
        return f"{puzzle.operands} {re.split(r'[-+*]', prompt)[0]}"
    assert isinstance(puzzle, KnightsAndKnaves)
    return f"{puzzle.people} {puzzle.parse(prompt)[0][0]}"


def topics_of(puzzle: Puzzle) -> list[str]:
    """All topics of a puzzle at its own size."""
    if isinstance(puzzle, ArithmeticChain):
        return [f"{puzzle.operands} {first}" for first in range(puzzle.modulus or 10)]
    assert isinstance(puzzle, KnightsAndKnaves)
    return [f"{puzzle.people} {form}" for form in FORMS]
