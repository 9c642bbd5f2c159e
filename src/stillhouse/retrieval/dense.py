"""Search by vectors: exact, and an embedder that needs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Embedder = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors of length one, (N, D) float32."""


class WordVectors:
    """A text is the normalised sum of its words' vectors.

    Args:
        split: cuts a text into words.
        vectors: those of known words.
        size: of the vectors, where none is known.

    Words without a vector get one that follows from a hash of the word: a random projection of the bag of words.
    """

    def __init__(
        self,
        split: Callable[[str], Sequence[str]],
        vectors: Mapping[str, Sequence[float]] | None = None,
        *,
        size: int = 64,
    ) -> None:
        self.split = split
        self.vectors = {word: np.asarray(vector, dtype=np.float64) for word, vector in (vectors or {}).items()}
        self.size = len(next(iter(self.vectors.values()))) if self.vectors else size

    def word(self, word: str) -> np.ndarray:
        """The vector of one word (D,)."""
        if word not in self.vectors:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            self.vectors[word] = np.random.default_rng(seed).standard_normal(self.size)
        return self.vectors[word]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        summed = np.zeros((len(texts), self.size))
        for row, text in zip(summed, texts, strict=True):
            for word in self.split(text):
                row += self.word(word)
        return (summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-12)).astype(np.float32)


class VectorIndex:
    """Exact search among vectors of length one."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def scores(self, query: np.ndarray) -> np.ndarray:
        """1 / (1 + distance) of every document, (N,), to a query (D,) of length one."""
        squared = np.maximum(2 - 2 * (self.vectors.astype(np.float64) @ query.astype(np.float64)), 0)
        return 1 / (1 + np.sqrt(squared))
