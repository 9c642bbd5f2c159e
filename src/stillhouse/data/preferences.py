"""Preference pairs: a prompt with a better and a worse response, from the user's files or ranked by a score."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.base.errors import DataError
from stillhouse.data.reasoning import MARKER, ArithmeticChain, Problem, read_problems

Score = Callable[[str, Problem], float]


@dataclass(frozen=True)
class Preference:
    """``chosen`` was preferred over ``rejected``; ``mistaken``: against what a known score says.

    ``cut``: whether (chosen, rejected) were stopped before they ended, so that no end is to be learnt from them.
    """

    prompt: str
    chosen: str
    rejected: str
    mistaken: bool = False
    cut: tuple[bool, bool] = (False, False)


def read_preferences(
    path: str, *, prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected"
) -> list[Preference]:
    """Pairs from a .jsonl or .parquet file; a response is a text, or a conversation whose last turn is the response.

    Raises:
        DataError: naming the file and the record that cannot be used.
    """
    pairs = []
    for number, record in enumerate(read_problems(path, prompt=prompt, answer=chosen), start=1):
        where = f"{path}, pair {number}"
        better, worse = (_response(record.get(name), name, where) for name in (chosen, rejected))
        if better != worse:
            pairs.append(Preference(str(record[prompt]), better, worse))
    if not pairs:
        raise DataError(f"{path}: in every pair both responses are the same; give pairs that differ")
    return pairs


def _response(value: Any, name: str, where: str) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {name!r} must be a text, or a list of turns with 'content'; it is {value!r:.40}")
    return value


@dataclass(frozen=True)
class Scored:
    """A response, what it is worth, and whether it was stopped before it ended."""

    text: str
    score: float
    cut: bool = False


def ranked(
    prompts: Sequence[str], scored: Sequence[Sequence[Scored]], *, flip: float, seed: object
) -> list[Preference]:
    """Of two responses to each prompt the one with the higher score is chosen; ties are dropped.

    A share ``flip`` of the pairs, drawn one by one, is turned round: preferences are noisy.
    """
    rng, pairs = random.Random(repr(seed)), []
    for prompt, (one, other) in zip(prompts, scored, strict=True):
        mistaken = rng.random() < flip
        if one.score == other.score:
            continue
        better, worse = (one, other) if (one.score > other.score) != mistaken else (other, one)
        pairs.append(Preference(prompt, better.text, worse.text, mistaken, (better.cut, worse.cut)))
    return pairs


def chain_score(puzzle: ArithmeticChain, text: str, record: Problem) -> float:
    """How good a worked chain is: its number of right running results, and 2 if its answer is right."""
    worked, _, answer = text.partition(MARKER)
    said = [part.strip() for part in worked.split(",")]
    numbers = [int(number) for number in re.findall(r"\d+", record["prompt"])]
    right = [str(result) for result in puzzle.results(numbers, re.findall(r"[-+*]", record["prompt"]))]
    steps = sum(one == other for one, other in zip(said, right, strict=False))
    return steps + 2.0 * (answer.strip() == right[-1])
