"""BLEU: how much of one text's n-grams are in another, for any tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Tokens], *, n: int = 4) -> float:
    """Corpus BLEU of 0 to 1, one reference a hypothesis (Papineni et al., 2002, ACL).

    The geometric mean of clipped n-gram precisions of the whole corpus, times exp(1 - r / c) where it is shorter than
    the references. The k-th precision in a row that is zero counts as 2^-k / total (Chen and Cherry, 2014, smoothing 3,
    as sacrebleu's "exp"); lengths of n-grams that no hypothesis is long enough for are left out.
    """
    matches, totals = [0] * n, [0] * n
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for size in range(1, n + 1):
            found, known = _grams(hypothesis, size), _grams(reference, size)
            matches[size - 1] += (found & known).total()
            totals[size - 1] += found.total()
    length, wanted = sum(map(len, hypotheses)), sum(map(len, references))
    if not length or not matches[0]:
        return float(not length and not wanted)
    logs, zeros = [], 0
    for match, total in zip(matches, totals, strict=True):
        if total:
            zeros += match == 0
            logs.append(math.log((match or 2.0**-zeros) / total))
    return math.exp(min(0.0, 1 - wanted / length) + sum(logs) / len(logs))


def _grams(tokens: Tokens, size: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
