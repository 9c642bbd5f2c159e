"""Search by words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class BM25:
    """Okapi BM25 over documents that are lists of words (Robertson and Zaragoza, 2009), computed by ``bm25s``.

    A word found f times in a document of length l counts idf f / (f + k1 (1 - b + b l / mean l)), with idf =
    ln(1 + (N - n + 1/2) / (n + 1/2)). (The factor k1 + 1 that some write above changes no order, nor a ratio.)
    """

    def __init__(self, documents: Sequence[Sequence[str]], *, k1: float = 1.5, b: float = 0.75) -> None:
        import bm25s

        self._size = len(documents)
        self._known = {word for words in documents for word in words}
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64")
        if self._known:
            self._index.index([list(words) for words in documents], show_progress=False)

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """Every document's score; words that no document holds count nothing."""
        known = [word for word in query if word in self._known]
        return np.asarray(self._index.get_scores(known)) if known else np.zeros(self._size)
