"""Conversations with an agent, the exchanges they consist of, and questions about them with known answers.

A transcript file has one conversation a line: ``{"id": ..., "project": ..., "time": ..., "messages": [{"role": ...,
"content": ...}, ...]}``; all but ``messages`` may be left out. A file of questions has one a line: ``{"query": ...,
"relevant": [{"conversation": ..., "ply": ..., "grade": 1-3}, ...]}``, where ``ply`` is the position of any message of
the exchange that answers and ``grade`` may be left out. A ply is one message.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.base.errors import DataError, suggest
from stillhouse.data.json_lines import json_lines

TOKEN = re.compile(r"\w+(?:[./_-]\w+)*")
CONVERSATION = '{"messages": [{"role": ..., "content": ...}, ...]}'
QUESTION = '{"query": ..., "relevant": [{"conversation": ..., "ply": ...}]}'


def words_of(text: str) -> list[str]:
    """Lower-case words; paths, dotted names and numbers with points stay whole."""
    return TOKEN.findall(text.lower())


@dataclass(frozen=True)
class Conversation:
    """``messages``: (role, content) pairs, in order; ``time`` orders conversations."""

    id: str
    messages: tuple[tuple[str, str], ...]
    project: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """The plies [start, end] of a conversation: a question and everything up to the next one."""

    conversation: str
    start: int
    end: int
    messages: tuple[tuple[str, str], ...]
    project: str = ""
    time: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.conversation}:{self.start}-{self.end}"

    @property
    def text(self) -> str:
        """The verbatim text."""
        return "\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class Query:
    """A question and the graded exchanges that answer it: ``key -> grade`` (0 of no use, 3 just what was asked)."""

    text: str
    relevant: Mapping[str, int]


def exchanges_of(conversation: Conversation, *, most_plies: int = 20, least_characters: int = 100) -> list[Exchange]:
    """Cut a conversation where a user speaks after somebody else has; too long ones are cut on, short ones dropped."""
    spans: list[list[int]] = []
    for ply, (role, _) in enumerate(conversation.messages):
        follows = ply > 0 and conversation.messages[ply - 1][0] == "user"
        if not spans or (role == "user" and not follows) or len(spans[-1]) == most_plies:
            spans.append([])
        spans[-1].append(ply)
    found = [
        Exchange(
            conversation.id,
            span[0],
            span[-1],
            conversation.messages[span[0] : span[-1] + 1],
            conversation.project,
            conversation.time,
        )
        for span in spans
    ]
    return [exchange for exchange in found if len(exchange.text) >= least_characters]


# -- the embedded conversations -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """Conversations with questions about them, and the vectors of their words, if they are known."""

    conversations: tuple[Conversation, ...]
    exchanges: tuple[Exchange, ...]
    queries: tuple[Query, ...] = ()
    vectors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    name: str = "demo"


def embedded_recall(
    *, exchanges: int = 800, queries: int = 200, topics: int = 40, size: int = 64, seed: int = 0
) -> Recall:
    """Conversations made by code: topical words in much filler, one unique identifier in each exchange.

    An exchange has 300 filler words (Zipf over 400), 8 of the 30 words of its topic one to five times each, 6 words of
    other topics, and an identifier twice; with chance 0.4 an unimportant number stands before it. A question has 3 of
    the 8 words, another word of the topic, 4 filler words and, with chance 0.3, the identifier. Word vectors are a
    topic's centre plus noise, and short for filler.
    """
    import numpy as np

    draw, noise = random.Random(seed), np.random.default_rng(seed)
    names = _names(draw, 400 + 30 * topics)
    filler, topical = names[:400], [names[400 + 30 * t : 430 + 30 * t] for t in range(topics)]
    zipf = [1 / (rank + 1) for rank in range(len(filler))]
    vectors = {word: 0.15 * noise.standard_normal(size) for word in filler}
    for words in topical:
        centre = noise.standard_normal(size)
        vectors |= {word: centre + 0.7 * noise.standard_normal(size) for word in words}

    conversations, made, questions = [], [], []
    per_conversation = 4
    asked = set(draw.sample(range(exchanges), queries))
    for number in range(0, exchanges, per_conversation):
        messages: list[tuple[str, str]] = []
        facts = []
        for place in range(number, min(number + per_conversation, exchanges)):
            topic = topical[draw.randrange(topics)]
            chosen = draw.sample(topic, 8)
            name = f"{draw.choice(names)}_{place:04d}.py"
            others = [draw.choice(draw.choice(topical)) for _ in range(6)]
            body = draw.choices(filler, zipf, k=300) + others + [w for w in chosen for _ in range(draw.randint(1, 5))]
            draw.shuffle(body)
            cut = draw.randint(20, 40)
            request, answer = body[:cut], body[cut:]
            first = draw.randrange(len(answer) // 2)
            answer.insert(first, name)
            answer.insert(draw.randrange(first + 1, len(answer)), name)
            if draw.random() < 0.4:
                request.insert(draw.randrange(len(request)), f"{draw.randint(2, 9) * 10}ms")
            messages += [("user", _prose(request)), ("assistant", _prose(answer))]
            facts.append((topic, chosen, name))
        conversation = Conversation(
            f"c{number // per_conversation:03d}", tuple(messages), f"project-{number % 3}", number
        )
        conversations.append(conversation)
        own = exchanges_of(conversation)
        made += own
        for offset, (exchange, (topic, chosen, name)) in enumerate(zip(own, facts, strict=True)):
            if number + offset in asked:
                rest = [word for word in topic if word not in chosen]
                text = [*draw.sample(chosen, 3), draw.choice(rest), *draw.choices(filler, zipf, k=4)]
                text += [name] if draw.random() < 0.3 else []
                questions.append(Query(" ".join(text), {exchange.key: 3}))
    return Recall(
        tuple(conversations), tuple(made), tuple(questions), {word: tuple(v.tolist()) for word, v in vectors.items()}
    )


def _names(draw: random.Random, count: int) -> list[str]:
    """Different words that can be spoken."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))
        found[word] = None
    return list(found)


def _prose(words: Sequence[str]) -> str:
    """Sentences of twelve words."""
    pieces = [words[start : start + 12] for start in range(0, len(words), 12)]
    return " ".join(" ".join(piece).capitalize() + "." for piece in pieces)


# -- the user's conversations ---------------------------------------------------------------------------------------


def load_recall(
    transcripts: str, queries: str | None = None, *, most_plies: int = 20, least_characters: int = 100
) -> Recall:
    """Read a file of transcripts, and a file of questions about them.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    conversations: list[Conversation] = []
    taken: set[str] = set()
    for where, row in json_lines(transcripts, like=CONVERSATION):
        conversation = _conversation(row, where, len(conversations))
        if conversation.id in taken:
            raise DataError(f"{where}: a second conversation with the id {conversation.id!r}; give each its own")
        taken.add(conversation.id)
        conversations.append(conversation)
    found = [
        exchange
        for conversation in conversations
        for exchange in exchanges_of(conversation, most_plies=most_plies, least_characters=least_characters)
    ]
    if not found:
        raise DataError(f"{transcripts}: no exchange of {least_characters} characters; lower least_characters")
    asked = [_query(row, where, found) for where, row in json_lines(queries, like=QUESTION)] if queries else []
    return Recall(tuple(conversations), tuple(found), tuple(asked), name=transcripts)


def _conversation(row: Mapping[str, Any], where: str, position: int) -> Conversation:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: no 'messages'{suggest('messages', row)}")
    pairs = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f'{where}: a message must be {{"role": "...", "content": "..."}}, not {message!r:.60}')
        pairs.append((message["role"], message["content"]))
    time = row.get("time", position)
    if not isinstance(time, int | float):
        raise DataError(f"{where}: time is {time!r}; give a number, such as seconds since 1970")
    return Conversation(str(row.get("id", position)), tuple(pairs), str(row.get("project", "")), float(time))


def _query(row: Mapping[str, Any], where: str, exchanges: Sequence[Exchange]) -> Query:
    if not isinstance(row.get("query"), str) or not isinstance(row.get("relevant"), list):
        raise DataError(f"{where}: must be {QUESTION}")
    grades: Counter[str] = Counter()
    for pointer in row["relevant"]:
        if not isinstance(pointer, dict) or "conversation" not in pointer:
            raise DataError(f"{where}: relevant holds {pointer!r:.60}; give conversation and ply")
        name, ply = str(pointer["conversation"]), int(pointer.get("ply", 0))
        key = next((e.key for e in exchanges if e.conversation == name and e.start <= ply <= e.end), None)
        if key is None:
            raise DataError(f"{where}: no exchange holds ply {ply} of conversation {name!r}")
        grades[key] = max(grades[key], int(pointer.get("grade", 1)))
    return Query(row["query"], dict(grades))
