"""Structured memories of exchanges: what is kept of each, the rooms they lie in, and the way back to the words.

A memory's short text (``core`` newline ``context``) is what is searched; the verbatim exchange stays where it was and
is found by the pointer (conversation, first ply, last ply).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from stillhouse.data.conversations import Conversation, Exchange, words_of

EXTENSIONS = "py|ipynb|jsx?|tsx?|rs|go|java|kt|cpp|hpp|cs|c|h|rb|php|swift|sh|sql|md|json|ya?ml|toml|html|css|txt|csv"
PATH = re.compile(rf"(?<![\w/\\.-])[\w./\\~-]*\w\.(?:{EXTENSIONS})\b", re.IGNORECASE)
BACKTICKS = re.compile(r"`([^`\n]+)`")
DETAIL = re.compile(
    rf"`[^`\n]+`|[\w./\\~-]*\w\.(?:{EXTENSIONS})\b|\w*Error\b[^.\n]{{0,60}}|\b\d+(?:\.\d+)*\w*\b|\b\w+_\w+\b"
)
SENTENCE = re.compile(r"[^.!?\n]+(?:\.(?=\w)[^.!?\n]+)*[.!?]?")


class Room(BaseModel):
    """A place in the memory that exchanges about one thing share."""

    type: Literal["file", "concept", "workflow"]
    key: Annotated[str, Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$", max_length=64, description="specific, snake_case")]
    label: Annotated[str, Field(max_length=120)]
    relevance: Annotated[float, Field(ge=0, le=1)]

    def id(self, project: str) -> str:
        """The room's identity: equal type, key and project are one room, whatever it is called."""
        return hashlib.sha256(f"{self.type}:{self.key}:{project}".encode()).hexdigest()[:16]


class Memory(BaseModel):
    """What a teacher writes about one exchange; paths are not its business (see `files_touched`)."""

    exchange_core: Annotated[str, Field(min_length=1, description="1-2 sentences: what was done or decided")]
    specific_context: Annotated[str, Field(description="one concrete detail, copied exactly")]
    room_assignments: Annotated[list[Room], Field(min_length=1, max_length=3)]

    @property
    def text(self) -> str:
        """What is indexed."""
        return f"{self.exchange_core}\n{self.specific_context}".strip()


def memory_prompt(exchange: Exchange, *, most_characters: int = 4000) -> str:
    """What a teacher is asked for an exchange; each message is cut to ``most_characters``."""
    told = "\n\n".join(f"{role}: {content[:most_characters]}" for role, content in exchange.messages)
    return (
        "Below is one exchange from the history of a person working with an assistant. Write its entry for a "
        "searchable memory, as JSON with the fields exchange_core, specific_context and room_assignments.\n"
        "exchange_core: one or two sentences, as in a commit message, on what was done or decided. Use the words of "
        "the exchange itself; people will search with them.\n"
        "specific_context: one concrete detail copied letter by letter (a number, an error text, a parameter, a path), "
        "but not the project's folder.\n"
        'room_assignments: one to three of {"type": "file" or "concept" or "workflow", "key": "specific_snake_case", '
        '"label": "...", "relevance": 0 to 1}.\n\n'
        f"{told}"
    )


def files_touched(text: str) -> list[str]:
    """Paths with a known extension: those in backticks first, slashes made alike, each once."""
    spans = [*BACKTICKS.findall(text), BACKTICKS.sub(" ", text)]
    paths = [match.replace("\\", "/").removeprefix("./") for span in spans for match in PATH.findall(span)]
    return list(dict.fromkeys(paths))


class RuleDistiller:
    """Memories by rule, where no language model is at hand: the most telling sentences and the first detail.

    A sentence tells as much as the tf-idf weights of its words in the exchange, each word once, over the square root of
    its length. Three sentences of twelve words are the 38 tokens of the paper's language model. The detail
    is the first span in backticks, path, error, number or name with an underscore.
    """

    def __init__(self, exchanges: Sequence[Exchange], *, sentences: int = 3) -> None:
        self.idf = inverse_document_frequencies([words_of(exchange.text) for exchange in exchanges])
        self.sentences = sentences

    def __call__(self, exchange: Exchange) -> Memory:
        found = [match.strip() for match in SENTENCE.findall(exchange.text) if words_of(match)]
        counts = Counter(words_of(exchange.text))
        best = sorted(range(len(found)), key=lambda i: -self._telling(found[i], counts))
        chosen = sorted(best[: self.sentences])
        core = " ".join(found[i] for i in chosen) or exchange.text[:200]
        detail = DETAIL.search(exchange.text)
        (topic, _), *_ = sorted(counts.items(), key=lambda pair: (-pair[1] * self.idf[pair[0]], pair[0]))
        files = files_touched(exchange.text)[:1]
        named = [("concept", topic, 0.5), *(("file", file, 1.0) for file in files)]
        return Memory(
            exchange_core=core,
            specific_context=detail.group().strip("`") if detail else "",
            room_assignments=[
                Room(type=kind, key=snake_case(name), label=name[:120], relevance=share)  # type: ignore[arg-type]
                for kind, name, share in named
            ],
        )

    def _telling(self, sentence: str, counts: Mapping[str, int]) -> float:
        words = words_of(sentence)
        return sum(counts[word] * self.idf.get(word, 0.0) for word in sorted(set(words))) / math.sqrt(len(words))


def snake_case(name: str) -> str:
    """``name`` as a room's key."""
    return "_".join(re.findall(r"[a-z0-9]+", name.lower()))[:64].strip("_") or "unnamed"


def inverse_document_frequencies(documents: Sequence[Sequence[str]]) -> dict[str, float]:
    """ln((N + 1) / (n + 1)) for every word, of N documents of which n hold it."""
    held = Counter(word for words in documents for word in set(words))
    return {word: math.log((len(documents) + 1) / (count + 1)) for word, count in held.items()}


@dataclass(frozen=True)
class Pointer:
    """Where a memory comes from: the plies [start, end] of a conversation."""

    conversation: str
    start: int
    end: int


def drill_down(pointer: Pointer, conversations: Iterable[Conversation]) -> list[tuple[str, str]]:
    """The verbatim (role, content) messages that a memory was made of. Raises ``KeyError`` for an unknown pointer."""
    for conversation in conversations:
        if conversation.id == pointer.conversation:
            return list(conversation.messages[pointer.start : pointer.end + 1])
    raise KeyError(pointer.conversation)


@dataclass(frozen=True)
class RoomEntry:
    """A room and the memories in it, oldest first."""

    id: str
    type: str
    key: str
    label: str
    project: str
    members: tuple[str, ...]


def room_index(memories: Iterable[tuple[Exchange, Sequence[Room]]]) -> dict[str, RoomEntry]:
    """All rooms by id; a room is called what its most relevant member calls it."""
    found: dict[str, list[tuple[Exchange, Room]]] = {}
    for exchange, rooms in memories:
        for room in rooms:
            found.setdefault(room.id(exchange.project), []).append((exchange, room))
    index = {}
    for identity, members in found.items():
        ordered = sorted(members, key=lambda pair: (pair[0].time, pair[0].conversation, pair[0].start))
        best = max(ordered, key=lambda pair: pair[1].relevance)[1]
        keys = dict.fromkeys(exchange.key for exchange, _ in ordered)
        index[identity] = RoomEntry(identity, best.type, best.key, best.label, ordered[0][0].project, tuple(keys))
    return index
