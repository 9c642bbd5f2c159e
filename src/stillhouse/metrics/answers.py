"""Scores of short answers to questions: exact match and the F1 of words (Rajpurkar et al., 2016, arXiv 1606.05250)."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}


def answer_words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ARTICLES]


def answer_f1(answer: str, gold: str) -> float:
    """F1 of the words of an answer, each as often as it occurs; 1 if both have none."""
    given, right = answer_words(answer), answer_words(gold)
    if not given or not right:
        return float(given == right)
    return 2 * (Counter(given) & Counter(right)).total() / (len(given) + len(right))


def answer_scores(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Exact match and F1, means over questions; of several right answers the one that fits best counts."""
    pairs = list(zip(answers, golds, strict=True))
    exact = [max(float(answer_words(answer) == answer_words(one)) for one in gold) for answer, gold in pairs]
    f1 = [max(answer_f1(answer, one) for one in gold) for answer, gold in pairs]
    return sum(exact) / len(exact), sum(f1) / len(f1)
