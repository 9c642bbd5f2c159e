"""What a language model was asked to write, read back: answers, votes, new problems with their answers, rankings.

D_kd = {Parse(o, s) | o ~ p(o | I + s)} (Xu et al., 2024, arXiv 2402.13116, section 3): the parsing, and what becomes of
answers that do not parse.

Shapes: B rows.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.errors import ConfigError
from stillhouse.data.alternating import Several
from stillhouse.data.responses import Coder, Row, filled
from stillhouse.data.verifiers import final_answer

BETWEEN = "\n\n"  # demonstrations


@dataclass(frozen=True)
class Written:
    """What was written to one request; ``text`` is None where there is no answer at all."""

    text: str | None
    finished: bool = True


@dataclass
class Elicited:
    """(prompt, response) pairs to learn from, and what became of the rest: ``dropped`` counts by reason.

    Reasons: ``failed`` (no answer), ``unfinished`` (cut at the longest length), ``unparsed`` (not in the form that was
    asked for), ``known`` (the prompt is held out, known, or came before), ``outvoted`` (too few answers agree).
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, int]:
        """Counts by name, those of the reasons too."""
        return {"kept": len(self.pairs), "dropped": self.dropped.total(), **self.dropped}

    def __str__(self) -> str:
        why = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{len(self.pairs)} of {len(self.pairs) + self.dropped.total()} kept" + (f"; {why}" if why else "")


@dataclass(frozen=True)
class Form:
    """How problems and responses look.

    Args:
        example: how a problem is written with its response: a template of ``{prompt}`` and ``{response}``.
        pattern: finds both in what a model wrote: a regular expression with two groups.
        marker: what the final answer follows.
        marked: whether a response without a final answer is none.

    Raises:
        ConfigError: a pattern that is no regular expression, or does not have two groups.
    """

    example: str
    pattern: str
    marker: str = "#"
    marked: bool = False

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(f"example_pattern={self.pattern!r} is no regular expression: {error}") from error
        if groups != 2:
            raise ConfigError(f"example_pattern={self.pattern!r} has {groups} groups; it needs two, problem and answer")

    def shown(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Problems with their responses, one after the other, as a model is shown them."""
        return BETWEEN.join(filled(self.example, prompt=prompt, response=response) for prompt, response in pairs)

    def response(self, written: Written) -> tuple[str, str]:
        """(response, "") or ("", the reason why it is none)."""
        if written.text is None:
            return "", "failed"
        if not written.finished:
            return "", "unfinished"
        text = written.text.strip()
        if not text or (self.marked and not final_answer(text, self.marker)):
            return "", "unparsed"
        return text, ""

    def problem(self, written: Written) -> tuple[str, str, str]:
        """(prompt, response, "") of a new problem, or ("", "", the reason why it is none)."""
        text, reason = self.response(written)
        found = re.search(self.pattern, text) if not reason else None
        if found is None:
            return "", "", reason or "unparsed"
        prompt = (found[1] or "").strip()
        response, reason = self.response(Written(found[2]))
        return (prompt, response, "") if prompt and not reason else ("", "", "unparsed")


def plain(prompt: str) -> str:
    """What two prompts that differ in blanks alone have in common."""
    return " ".join(prompt.split())


def answered(
    prompts: Sequence[str], written: Sequence[Sequence[Written]], form: Form, *, least: float = 0.0
) -> Elicited:
    """Answers to given prompts: of several to one prompt the first that has the commonest final answer.

    ``least``: that answer's share of all that were asked for, at least; those that do not parse agree with nobody.
    """
    found = Elicited()
    for prompt, several in zip(prompts, written, strict=True):
        read = [form.response(one) for one in several]
        texts = [text for text, reason in read if not reason]
        votes = Counter(plain(final_answer(text, form.marker) or text) for text in texts)
        if not texts:
            found.dropped[Counter(reason for _, reason in read).most_common(1)[0][0]] += 1
            continue
        (answer, count), *_ = votes.most_common(1)
        if count / len(several) < least:
            found.dropped["outvoted"] += 1
            continue
        said = next(text for text in texts if plain(final_answer(text, form.marker) or text) == answer)
        found.pairs.append((prompt, said))
    return found


def invented(written: Sequence[Written], form: Form, *, known: Collection[str]) -> Elicited:
    """New problems with their answers; ``known``: prompts (`plain`) that are not new."""
    found, taken = Elicited(), set(known)
    for one in written:
        prompt, response, reason = form.problem(one)
        if not reason and plain(prompt) in taken:
            reason = "known"
        if reason:
            found.dropped[reason] += 1
            continue
        taken.add(plain(prompt))
        found.pairs.append((prompt, response))
    return found


def demonstrations(
    pairs: Sequence[tuple[str, str]], count: int, requests: int, *, seed: object
) -> list[list[tuple[str, str]]]:
    """``count`` of ``pairs``, or all if they are fewer, drawn anew for each of so many requests."""
    draws = (random.Random(f"{seed!r} {number}") for number in range(requests))
    return [rng.sample(list(pairs), min(count, len(pairs))) for rng in draws]


@dataclass(frozen=True)
class Ranked:
    """Guesses at one prompt, the best first, and whether each was cut before it ended."""

    prompt: str
    texts: tuple[str, ...]
    cut: tuple[bool, ...]


def in_order(prompt: str, texts: Sequence[str], cut: Sequence[bool], scores: Sequence[float]) -> Ranked | None:
    """Different guesses by falling score; of those with the same score the first; None if fewer than two are left."""
    chosen: dict[float, int] = {}
    said: set[str] = set()
    for place, (text, score) in enumerate(zip(texts, scores, strict=True)):
        if text not in said and score == score:
            chosen.setdefault(score, place)
        said.add(text)
    places = [chosen[score] for score in sorted(chosen, reverse=True)]
    if len(places) < 2:
        return None
    return Ranked(prompt, tuple(texts[at] for at in places), tuple(cut[at] for at in places))


def coded(coder: Coder, prompt: str, text: str, *, cut: bool = False) -> Row:
    """A response as tokens; of one that was cut no end is to be learnt."""
    ids, response = coder.row(prompt, text)
    return ids, response[:-1] if cut else response


def best_and_worst(coder: Coder, lists: Sequence[Ranked]) -> dict[str, Tensor]:
    """The batch of the first and the last of each ranking: all first ones first."""
    rows = [
        tuple(coded(coder, one.prompt, one.texts[at], cut=one.cut[at]) for at in (0, len(one.texts) - 1))
        for one in lists
    ]
    return coder.pairs([(better, worse) for better, worse in rows])


def whole_lists(coder: Coder, lists: Sequence[Ranked]) -> dict[str, Tensor]:
    """The batch of whole rankings: ``list`` (B) says which a row is of, ``rank`` (B) is the higher the better."""
    places = [(number, at) for number, one in enumerate(lists) for at in range(len(one.texts))]
    rows = [coded(coder, lists[n].prompt, lists[n].texts[at], cut=lists[n].cut[at]) for n, at in places]
    rank_B = torch.tensor([float(len(lists[n].texts) - 1 - at) for n, at in places])
    return {**coder.batch(rows), "list": torch.tensor([n for n, _ in places]), "rank": rank_B}


class Beside(Several):
    """Every batch is one of ``source``, and has one of ``text`` as its entry ``text``; ``epoch`` is the source's."""

    def __init__(self, source: Any, text: Any) -> None:
        super().__init__((source, text))

    @property
    def epoch(self) -> int:
        return int(self.sources[0].epoch)

    def __next__(self) -> dict[str, Any]:
        batch, text = (next(source) for source in self.sources)
        return {**batch, "text": text}

    def state_dict(self) -> dict[str, Any]:
        return {"sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
