"""How different several responses to the same prompt are, for any tokens.

Losses that seek modes buy closeness to the teacher with diversity (the survey of on-policy distillation, card 151). All
figures depend on how long responses are and on how many there are to a prompt: compare models at the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Tokens = Sequence[Hashable]


@dataclass(frozen=True)
class Diversity:
    """Means over prompts.

    Attributes:
        different: share of different responses among those to one prompt.
        distinct: by n, the share of different n-grams in the responses to one prompt, 1 where nothing comes twice.
        self_bleu: see `self_bleu`; 0 to 1, higher where responses are alike.
    """

    different: float
    distinct: dict[int, float]
    self_bleu: float


def diversity(groups: Sequence[Sequence[Tokens]], *, grams: Sequence[int] = (1, 2, 4)) -> Diversity:
    """The diversity of ``groups``: the responses to one prompt each."""
    return Diversity(
        different=_mean([len({tuple(one) for one in group}) / len(group) for group in groups]),
        distinct={n: _mean([distinct(group, n) for group in groups]) for n in grams},
        self_bleu=_mean([self_bleu(group) for group in groups if len(group) > 1]),
    )


def distinct(responses: Sequence[Tokens], n: int) -> float:
    """Distinct-n: different n-grams over all n-grams (Li et al., 2016, arXiv 1510.03055); 1 where there are none."""
    found = Counter[tuple[Hashable, ...]]()
    for response in responses:
        found += _grams(response, n)
    return len(found) / found.total() if found else 1.0


def self_bleu(responses: Sequence[Tokens], *, n: int = 4) -> float:
    """Mean BLEU of each response against all others (Zhu et al., 2018, Texygen, arXiv 1802.01886), 0 to 1.

    N-grams are clipped at the most that one other response has of them; the brevity penalty is to the other nearest in
    length, the shorter of two. The k-th precision in a row that is zero counts as 2^-k / total, and lengths of n-grams
    that a response is too short for are left out, as in `stillhouse.metrics.bleu.bleu`.
    """
    return _mean([_among_others(responses, place, n) for place in range(len(responses))])


def _among_others(responses: Sequence[Tokens], place: int, n: int) -> float:
    """BLEU of the response at ``place`` against the others."""
    one, others = responses[place], [*responses[:place], *responses[place + 1 :]]
    if not one:
        return float(any(not other for other in others))
    logs, zeros = [], 0
    for size in range(1, min(n, len(one)) + 1):
        grams, most = _grams(one, size), Counter[tuple[Hashable, ...]]()
        for other in others:
            most |= _grams(other, size)
        match = (grams & most).total()
        if size == 1 and not match:
            return 0.0
        zeros += match == 0
        logs.append(math.log((match or 2.0**-zeros) / grams.total()))
    wanted = min((abs(len(other) - len(one)), len(other)) for other in others)[1]
    return math.exp(min(0.0, 1 - wanted / len(one)) + sum(logs) / len(logs))


def _grams(tokens: Tokens, size: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
