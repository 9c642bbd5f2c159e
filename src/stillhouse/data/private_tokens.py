"""How likely each token of a text is private: by rules and names found in it, or by how rare what stands before it is.

Scores are in [0, 1]; that of column t is about token t itself. Shapes: N sequences, T tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.base.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = (
    r"\d",  # numbers of any kind: telephone, account, house, date
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # e-mail
    r"https?://\S+",
    r"\b(?=\w*\d)(?=\w*[A-Z])\w{5,}\b",  # identifiers of capitals and digits
    r"\b(?:Mr|Mrs|Ms|Dr|Prof)\.?\s+[A-Z]\w+(?:\s+[A-Z]\w+)?",  # a title and who has it
    r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)+",  # several capitalised words within a sentence
)
"""Regular expressions of what is taken to be private."""


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token by itself, with the blank before it where the token stands for one."""
    texts = tokenizer.batch_decode([[token] for token in ids])
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f" {text}" if str(name).startswith("▁") and not text.startswith(" ") else text
        for name, text in zip(raw, texts, strict=True)
    ]


Spans = Callable[[list[str]], list[list[tuple[int, int]]]]
"""From texts to the places of what is private in each: first character, and the one after the last."""


def span_scores(
    ids_NT: Tensor, tokenizer: PreTrainedTokenizerBase, spans: Sequence[Spans], *, around: int = 0
) -> Tensor:
    """1 on tokens that share a character with a span that one of ``spans`` finds in their sequence, else 0: (N, T).

    ``around`` tokens on both sides are flagged with them. Special tokens end a text: they are read as an empty line.
    """
    known = torch.unique(ids_NT).tolist()
    texts = dict(zip(known, pieces(known, tokenizer), strict=True))
    texts |= dict.fromkeys(set(tokenizer.all_special_ids) & texts.keys(), "\n\n")
    rows = ids_NT.tolist()
    written = ["".join(texts[token] for token in row) for row in rows]
    found = [find(written) for find in spans]
    score_NT = torch.zeros(ids_NT.shape)
    for number, (row, text) in enumerate(zip(rows, written, strict=True)):
        private = torch.zeros(len(text) + 1)
        for first, last in (span for each in found for span in each[number]):
            private[first:last] = 1
        covered = private.cumsum(0)
        ends = list(itertools.accumulate(len(texts[token]) for token in row))
        for place, end in enumerate(ends):
            start = ends[place - 1] if place else 0
            before = float(covered[start - 1]) if start else 0.0
            score_NT[number, place] = float(end > start and float(covered[end - 1]) > before)
    if around:
        pooled = torch.nn.functional.max_pool1d(score_NT.unsqueeze(1), 2 * around + 1, stride=1, padding=around)
        score_NT = pooled.squeeze(1)
    return score_NT


def rule_spans(extra: str | None = None) -> Spans:
    """Finds the matches of `RULES` and of the expression ``extra``.

    Raises `ConfigError` if ``extra`` is not a regular expression.
    """
    try:
        rules = [re.compile(rule) for rule in (*RULES, *([extra] if extra else []))]
    except re.error as error:
        raise ConfigError(f"patterns={extra!r} is not a regular expression ({error})") from error
    return lambda texts: [[match.span() for rule in rules for match in rule.finditer(text)] for text in texts]


def rule_scores(
    ids_NT: Tensor, tokenizer: PreTrainedTokenizerBase, *, extra: str | None = None, around: int = 0
) -> Tensor:
    """`span_scores` of `rule_spans`."""
    return span_scores(ids_NT, tokenizer, [rule_spans(extra)], around=around)


def frequency_scores(ids_NT: Tensor, *, n: int, c: float) -> Tensor:
    """exp(-count / c) of the ``n`` tokens before each, counted in these sequences: what is said once is private.

    At a sequence's beginning there are fewer; these are counted as they are.
    """
    rows = ids_NT.tolist()

    def contexts(row: Sequence[int]) -> list[tuple[Any, ...]]:
        return [tuple(row[max(0, place - n) : place]) for place in range(len(row))]

    counts = Counter(context for row in rows for context in contexts(row))
    return torch.tensor([[math.exp(-counts[context] / c) for context in contexts(row)] for row in rows])


class Beside:
    """A map-style data set whose items are dicts, with a row (or several) of further tensors of the same length."""

    def __init__(self, data: Any, **rows: Tensor) -> None:
        self.data = data
        self.rows = rows

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Any]:
        return {**self.data[index], **{name: row[index] for name, row in self.rows.items()}}
