"""Search by vectors, exact or approximate, and an embedder that needs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stillhouse.base.errors import ConfigError

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


class HNSWIndex:
    """Approximate search among vectors of length one, in time that hardly grows with their number: a hierarchical
    navigable small-world graph (Malkov and Yashunin, 2016, arXiv 1603.09320), computed by ``usearch``.

    Args:
        vectors: (N, D) float32.
        connectivity: neighbours that each vector keeps in the graph.
        build_width, width: candidates that are held while the graph is built, and while it is searched; wider finds
            more of what exact search finds, and takes longer.

    Raises:
        ConfigError: ``usearch`` is not installed.
    """

    def __init__(self, vectors: np.ndarray, *, connectivity: int = 16, build_width: int = 128, width: int = 64) -> None:
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ConfigError("HNSW search needs the package usearch: pip install 'stillhouse[hnsw]'") from error
        self._graph = Index(
            ndim=vectors.shape[1],
            metric="l2sq",
            dtype="f32",
            connectivity=connectivity,
            expansion_add=build_width,
            expansion_search=width,
        )
        if len(vectors):  # one thread: what comes first shapes the graph
            self._graph.add(np.arange(len(vectors)), np.ascontiguousarray(vectors, dtype=np.float32), threads=1)

    def nearest(self, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (K,) of the ``count`` nearest vectors as far as they are found, nearest first, and their scores
        1 / (1 + distance), as `VectorIndex` has them."""
        if not len(self._graph):
            return np.zeros(0, dtype=np.int64), np.zeros(0)
        found = self._graph.search(query.astype(np.float32), min(count, len(self._graph)), threads=1)
        squared = np.maximum(found.distances.astype(np.float64), 0)
        best = np.lexsort((found.keys, squared))
        return found.keys[best].astype(np.int64), 1 / (1 + np.sqrt(squared[best]))
