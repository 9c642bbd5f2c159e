"""Four small domains over one set of characters: two easy ones that fill a corpus, two hard ones that are rare in it.

``drill`` and ``march`` are Markov chains of first order, near deterministic; ``weave`` is one of third order, whose
rules take capacity; ``sums`` are additions modulo ten, such as ``7+8=5``. Everything is fixed by the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LETTERS = "abcdefgh"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS + "+= "
DOMAINS = ("drill", "march", "weave", "sums")


@dataclass(frozen=True)
class ToyDomains:
    """How much of each domain the corpus has, and how strict its rules are.

    Attributes:
        documents: of all domains together, by ``shares``; each of ``length`` characters.
        easy, hard: what the logits of the chains of first and of third order are multiplied with.
        seed: of the rules.
        draw: of the documents; other ones follow the same rules.
    """

    documents: int = 8000
    shares: tuple[float, ...] = (0.45, 0.45, 0.07, 0.03)
    length: int = 31
    easy: float = 4.0
    hard: float = 3.0
    seed: int = 0
    draw: int = 0


def toy_domains(recipe: ToyDomains = ToyDomains()) -> dict[str, list[str]]:
    """Name of a domain -> its documents."""
    rules = np.random.default_rng(recipe.seed)
    draw = np.random.default_rng([recipe.seed, recipe.draw])
    tables = [_table(1, recipe.easy, rules), _table(1, recipe.easy, rules), _table(3, recipe.hard, rules)]
    counts = [max(1, round(share * recipe.documents)) for share in recipe.shares]
    made = [
        _walks(table, order, count, recipe.length, draw)
        for table, order, count in zip(tables, (1, 1, 3), counts, strict=False)
    ]
    texts = [["".join(LETTERS[letter] for letter in row) for row in rows.tolist()] for rows in made]
    texts.append([_sums(recipe.length, draw) for _ in range(counts[3])])
    return dict(zip(DOMAINS, texts, strict=True))


def _table(order: int, sharpness: float, random: np.random.Generator) -> np.ndarray:
    """Probabilities of the next letter in every context of ``order`` letters: softmax of normal numbers."""
    logits = sharpness * random.standard_normal((len(LETTERS) ** order, len(LETTERS)))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _walks(table: np.ndarray, order: int, count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Random walks by a table, the first ``order`` letters drawn evenly: (count, length)."""
    size = len(LETTERS)
    found = np.empty((count, length), np.int64)
    found[:, :order] = random.integers(size, size=(count, order))
    cumulative = table.cumsum(1)
    powers = size ** np.arange(order)[::-1]
    for place in range(order, length):
        context = found[:, place - order : place] @ powers
        found[:, place] = (random.random((count, 1)) > cumulative[context]).sum(1)
    return np.minimum(found, size - 1)


def _sums(length: int, random: np.random.Generator) -> str:
    parts = []
    for _ in range(length // 6 + 1):
        a, b = random.integers(10, size=2).tolist()
        parts.append(f"{a}+{b}={(a + b) % 10}")
    return " ".join(parts)[:length]
