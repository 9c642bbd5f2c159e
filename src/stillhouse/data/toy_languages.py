"""Small languages made by code: one grammar, several vocabularies, and a question that word order decides.

A sentence says who does something to whom: ``the old dog sees a small river near the town``. Nouns are of one of
four kinds, and adjectives go with nouns of one kind only. The *label* of a sentence is the kind of the one who acts,
who comes first. A bag of words holds all kinds and not which of them acts; which nouns are of one kind, because they
stand beside the same adjectives, unlabelled text tells.

All languages share the grammar. Words are drawn anew for each language, but for a share of *anchors* that all have in
common, as names and numbers are. Everything is fixed by the language's number and a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

KINDS = ("animal", "person", "tool", "place")
ONSETS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Shape:
    """How many words a language has of each sort: nouns and adjectives of each kind, verbs, determiners."""

    nouns: int = 16
    adjectives: int = 4
    verbs: int = 12
    determiners: int = 3
    anchors: float = 0.1  # share of all words that every language has


@dataclass(frozen=True)
class Language:
    """The words of one language; ``nouns[kind]`` and ``adjectives[kind]`` by kind."""

    nouns: tuple[tuple[str, ...], ...]
    adjectives: tuple[tuple[str, ...], ...]
    verbs: tuple[str, ...]
    determiners: tuple[str, ...]
    near: str

    @property
    def words(self) -> list[str]:
        """All of its words."""
        sorts = (*self.nouns, *self.adjectives, self.verbs, self.determiners, (self.near,))
        return [word for sort in sorts for word in sort]

    def sentence(self, draw: random.Random, *, adjectives: float = 0.85) -> tuple[str, int]:
        """A sentence and its label, the kind of the one who acts; this share of nouns has an adjective."""
        first, second = draw.sample(range(len(KINDS)), 2)
        words = [*self._noun(first, adjectives, draw), draw.choice(self.verbs)]
        words += self._noun(second, adjectives, draw)
        if draw.random() < 0.3:
            words += [self.near, *self._noun(draw.randrange(len(KINDS)), adjectives, draw)]
        return " ".join(words), first

    def _noun(self, kind: int, adjectives: float, draw: random.Random) -> list[str]:
        adjective = [draw.choice(self.adjectives[kind])] if draw.random() < adjectives else []
        return [draw.choice(self.determiners), *adjective, draw.choice(self.nouns[kind])]


@cache
def languages(count: int = 1, shape: Shape = Shape(), seed: int = 0) -> tuple[Language, ...]:
    """The first ``count`` languages; no two share a word that is not an anchor."""
    draw = random.Random(f"toy languages {seed}")
    taken: set[str] = set()

    def word() -> str:
        while True:
            made = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((2, 3))))
            if made not in taken:
                taken.add(made)
                return made

    sizes = [shape.nouns] * len(KINDS) + [shape.adjectives] * len(KINDS) + [shape.verbs, shape.determiners, 1]
    common = {(n, i): word() for n, size in enumerate(sizes) for i in range(size) if draw.random() < shape.anchors}
    made = []
    for _ in range(count):
        sorts = [tuple(common.get((n, i)) or word() for i in range(size)) for n, size in enumerate(sizes)]
        kinds = len(KINDS)
        verbs, determiners, (near,) = sorts[2 * kinds :]
        made.append(Language(tuple(sorts[:kinds]), tuple(sorts[kinds : 2 * kinds]), verbs, determiners, near))
    return tuple(made)


def sentences(language: Language, count: int, seed: str, *, adjectives: float = 0.85) -> tuple[list[str], list[int]]:
    """``count`` sentences and their labels; ``seed`` names what they are for: held-out ones get another name."""
    draw = random.Random(seed)
    pairs = [language.sentence(draw, adjectives=adjectives) for _ in range(count)]
    return [text for text, _ in pairs], [label for _, label in pairs]


def borrowing(spoken: Sequence[Language], count: int, seed: str, *, rate: float = 0.3) -> list[str]:
    """``count`` sentences, language after language, in which each word is with this probability another language's."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        own = spoken[number % len(spoken)]
        other = draw.choice(spoken)
        same = dict(zip(own.words, other.words, strict=True))
        words = own.sentence(draw)[0].split()
        made.append(" ".join(same[word] if draw.random() < rate else word for word in words))
    return made


def vocabulary(spoken: Sequence[Language]) -> list[str]:
    """All words of several languages, each once, in order."""
    return list(dict.fromkeys(word for language in spoken for word in language.words))
