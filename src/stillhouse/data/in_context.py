"""Tasks for in-context learning: demonstrations, a question, an answer, and what else could have been answered.

Shapes: B batch, D tokens of demonstrations, T tokens of question and answer, Y tokens of an answer and its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.errors import DataError
from stillhouse.data.json_lines import json_lines

Tokens = tuple[int, ...]
UNSCORED = -100
"""The target of a place that is not scored."""


@dataclass(frozen=True)
class Example:
    """A question, its answer, and the candidates the answer is one of (none: the answer is free text), as tokens."""

    question: Tokens
    answer: Tokens
    candidates: tuple[Tokens, ...] = ()


@dataclass(frozen=True)
class IclTask:
    """The examples of one task, of which some are shown and the others asked."""

    name: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Item:
    """One thing to read: demonstrations, then a question and an answer."""

    demonstrations: Tokens
    question: Tokens
    answer: Tokens = ()


def all_maps(keys: int, labels: int, *, seed: int) -> Tensor:
    """Every map from keys to labels, once, in an order that depends on the seed: (labels ** keys, keys)."""
    maps = torch.cartesian_prod(*[torch.arange(labels)] * keys).reshape(-1, keys)
    return maps[torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))]


def key_map(chosen: Sequence[int], labels: int, *, copies: int) -> list[dict[str, Any]]:
    """Records of one embedded task: a map that gives each key its label, every pair ``copies`` times."""
    names = [f"v{number}" for number in range(labels)]
    task = "map " + " ".join(map(str, chosen))
    pairs = [{"task": task, "input": f"k{key}", "output": names[label]} for key, label in enumerate(chosen)]
    return [{**pair, "candidates": names} for pair in pairs for _ in range(copies)]


def pair_streams(maps: Tensor, count: int, pairs: int, *, generator: torch.Generator) -> Tensor:
    """Streams of key, label, key, label, ..., each of one of the ``maps`` (M, keys), keys first in the vocabulary.

    Returns:
        (count, 2 pairs).
    """
    keys = maps.shape[1]
    chosen = maps[torch.randint(len(maps), (count,), generator=generator)]
    shown = torch.randint(keys, (count, pairs), generator=generator)
    return torch.stack([shown, keys + chosen.gather(1, shown)], -1).flatten(1)


def read_records(file: str | Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file: ``task``, ``input``, ``output`` and, perhaps, ``candidates``.

    Raises:
        DataError: one line that says what is wrong, in which line, and what to do.
    """
    records = []
    for place, record in json_lines(file, like='{"task": ..., "input": ..., "output": ...}'):
        if not all(isinstance(record.get(name), str) for name in ("task", "input", "output")):
            raise DataError(f"{place}: must have task, input and output as text")
        candidates = record.get("candidates") or []
        if not isinstance(candidates, list) or (candidates and record["output"] not in candidates):
            raise DataError(f"{place}: candidates must be a list that has the output in it")
        records.append(record)
    if not records:
        raise DataError(f"{file}: no records in it; give at least two tasks")
    return records


def tasks_of(
    records: Sequence[dict[str, Any]], encode: Callable[[str], list[int]], *, separator: str, end: str
) -> list[IclTask]:
    """The tasks in some records, in their order; a question ends with ``separator``, an answer with ``end``.

    Raises:
        DataError: a question has no tokens.
    """

    def question(record: dict[str, Any]) -> Tokens:
        tokens = tuple(encode(record["input"] + separator))
        if not tokens:
            raise DataError(f"task {record['task']!r}: an input is empty, and so is the separator; give one of them")
        return tokens

    def answer(text: str) -> Tokens:
        return tuple(encode(text + end))

    found: dict[str, list[Example]] = {}
    for record in records:
        candidates = tuple(answer(one) for one in record.get("candidates") or ())
        found.setdefault(record["task"], []).append(Example(question(record), answer(record["output"]), candidates))
    return [IclTask(name, tuple(examples)) for name, examples in found.items()]


def shown(examples: Sequence[Example]) -> Tokens:
    """Demonstrations one after the other."""
    return tuple(token for one in examples for token in (*one.question, *one.answer))


def collate(items: Sequence[Item], *, pad: int, demo_tokens: int) -> dict[str, Tensor]:
    """Items as a batch.

    ``demo_ids`` and ``demo_mask`` (B, D), filled up at the left and cut there to ``demo_tokens``; ``input_ids`` and
    ``attention_mask`` (B, T), question and answer, filled up at the right; ``targets`` (B, T - 1), what position t has
    to say: the answer's tokens, `UNSCORED` elsewhere.
    """
    demos = [item.demonstrations[max(0, len(item.demonstrations) - demo_tokens) :] for item in items]
    texts = [(*item.question, *item.answer) for item in items]
    D, T = max(map(len, demos)), max(map(len, texts))
    targets = [[*[UNSCORED] * (len(item.question) - 1), *item.answer][: T - 1] for item in items]
    rows = {
        "demo_ids": [[pad] * (D - len(demo)) + list(demo) for demo in demos],
        "demo_mask": [[0] * (D - len(demo)) + [1] * len(demo) for demo in demos],
        "input_ids": [list(text) + [pad] * (T - len(text)) for text in texts],
        "attention_mask": [[1] * len(text) + [0] * (T - len(text)) for text in texts],
        "targets": [row + [UNSCORED] * (T - 1 - len(row)) for row in targets],
    }
    return {name: torch.tensor(values, dtype=torch.int64).reshape(len(items), -1) for name, values in rows.items()}


def collate_answers(items: Sequence[Item], *, pad: int, start: int, end: int, demo_tokens: int) -> dict[str, Tensor]:
    """Items as a batch for an encoder, which reads the question, and a decoder, which writes the answer.

    ``demo_ids`` and ``demo_mask`` as in `collate`; ``input_ids`` and ``attention_mask`` (B, T), the question, filled up
    at the right; ``decoder_input_ids`` (B, Y), ``start`` and the answer, whose position t has to say ``targets``
    (B, Y), the answer and ``end``, `UNSCORED` after it; ``answer_mask`` (B, Y).
    """
    asked = collate([Item(one.demonstrations, one.question) for one in items], pad=pad, demo_tokens=demo_tokens)
    Y = max(len(one.answer) for one in items) + 1
    answers = [one.answer for one in items]
    rows = {
        "decoder_input_ids": [[start, *one, *[pad] * (Y - 1 - len(one))] for one in answers],
        "answer_mask": [[1] * (len(one) + 1) + [0] * (Y - 1 - len(one)) for one in answers],
        "targets": [[*one, end, *[UNSCORED] * (Y - 1 - len(one))] for one in answers],
    }
    return {**asked, **{name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}}


def episode(task: IclTask, demos: int, generator: torch.Generator) -> Item:
    """Some examples of a task as demonstrations, and another one to answer."""
    order = torch.randperm(len(task.examples), generator=generator).tolist()
    asked = task.examples[order[0]]
    return Item(shown([task.examples[number] for number in order[1 : demos + 1]]), asked.question, asked.answer)


def shuffled(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    """The examples with their answers exchanged at random: the same tokens, and nothing to learn from them."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [Example(one.question, examples[n].answer, one.candidates) for one, n in zip(examples, order, strict=True)]
