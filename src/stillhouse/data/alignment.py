"""One text in two tokenizers: where their tokens end together, and batches that say so.

The smallest pieces of text that both tokenizers cover with whole tokens are chunks. `chunks_of` finds them from where
tokens end; `Translator` writes tokens of one tokenizer in another's; `PairedWindows` and `PairedConversations` are the
language task's windows with both, and `Paired` does the same to batches of any source, such as a student's own text.

A paired batch has the student's ``input_ids``, ``attention_mask`` and ``loss_mask`` (1 on tokens of a chunk that
counts), ``chunks`` (B, S): the number of the chunk each token belongs to, -1 where it counts in none; ``bytes`` (B, 1)
of the text in these chunks; and ``teacher``: the same for the teacher. A chunk has the same number on both sides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stillhouse.base.errors import DataError, ModelError
from stillhouse.data.encoding import encode_conversations
from stillhouse.data.sources import Wrapped
from stillhouse.data.token_bytes import Vocabulary

if TYPE_CHECKING:
    from stillhouse.core.source import Source

Unbiased = Callable[[int, int], bool]
"""Whether a chunk may end with this pair of tokens, the teacher's and the student's."""

NOWHERE = -1


@dataclass
class Placed:
    """Tokens, and where each ends: a count of bytes that both tokenizers share; -1 for tokens that count nowhere.

    ``cuts``: places that no chunk may cross; ``torn``: those of them after which the two sides do not begin together.
    """

    ids: np.ndarray
    ends: np.ndarray
    cuts: list[int] = field(default_factory=list)
    torn: set[int] = field(default_factory=set)


def chunks_of(
    first: Placed, second: Placed, *, unbiased: Callable[[int, int], bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The chunk of every token of two tokenizations of one text; -1 where there is none.

    A chunk ends wherever a token of both ends (and ``unbiased`` allows it; else it goes on). Numbers count up along
    the text, and are left out where a chunk was cut.
    """
    common = np.intersect1d(first.ends[first.ends > 0], second.ends[second.ends > 0])
    if unbiased is not None and len(common):
        pairs = zip(*(_last_ids(one, common) for one in (first, second)), strict=True)
        common = common[[unbiased(int(one), int(other)) for one, other in pairs]]
    bounds = np.union1d(common, np.array(first.cuts + second.cuts, dtype=common.dtype))
    whole = np.isin(bounds, common)
    torn = np.isin(bounds, list(first.torn | second.torn))
    whole[1:] &= ~torn[:-1]
    found = []
    for one in (first, second):
        place = np.searchsorted(bounds, one.ends)
        inside = (one.ends > 0) & (place < len(bounds))
        found.append(np.where(inside & np.append(whole, False)[place], place, NOWHERE))
    shared = np.intersect1d(found[0], found[1])
    return tuple(np.where(np.isin(one, shared), one, NOWHERE) for one in found)  # type: ignore[return-value]


def _last_ids(placed: Placed, common: np.ndarray) -> np.ndarray:
    """The token that ends at each of some places."""
    counted = placed.ends > 0
    return placed.ids[counted][np.searchsorted(placed.ends[counted], common, side="right") - 1]


def kept_within(first: np.ndarray, second: np.ndarray, lengths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of two sequences cut to ``lengths``, without those that are cut or hold a first token.

    The first token of a sequence is read, not predicted, so its chunk has no likelihood.
    """
    lost = np.concatenate([first[:1], first[lengths[0] :], second[:1], second[lengths[1] :]])
    return tuple(
        np.where(np.isin(one, lost), NOWHERE, one)[:length]
        for one, length in zip((first, second), lengths, strict=True)
    )  # type: ignore[return-value]


class Translator:
    """Writes what one tokenizer's ids say in the tokens of another.

    EOS becomes EOS (and counts as one place of text); BOS is put where the other tokenizer puts it itself; other
    special tokens have no counterpart and count nowhere. Text that is not whole (a window may begin or end within a
    character) is left out of the translation.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        for side in (source, target):
            if side.role("eos_token_id") is None:
                raise ModelError("a tokenizer has no end-of-text token, which must end every document; set eos_token")
        self.source, self.target = source, target
        self._ends = (int(source.tokenizer.eos_token_id), int(target.tokenizer.eos_token_id))
        self._lead = target.lead

    def __call__(self, rows: Sequence[np.ndarray]) -> list[tuple[Placed, Placed]]:
        """Rows of ids, placed, with their translations."""
        cut = [self._segments(ids) for ids in rows]
        texts = [text for segments in cut for _, _, text, _ in segments]
        encoded = iter(self.target.encode([text.decode() for text in texts]))
        return [self._joined(ids, segments, encoded) for ids, segments in zip(rows, cut, strict=True)]

    def _segments(self, ids: np.ndarray) -> list[tuple[int, int, bytes, int]]:
        """(first token, end, whole text, bytes before it) of what stands between special tokens."""
        stops = [-1, *np.flatnonzero(self.source.special[ids]).tolist(), len(ids)]
        found = []
        for before, after in itertools.pairwise(stops):
            if after - before > 1:
                whole = self.source.text(ids[before + 1 : after])
                skipped = next((n for n in range(min(4, len(whole))) if whole[n] & 0xC0 != 0x80), 0)
                try:
                    text = whole[skipped:]
                    text.decode()
                except UnicodeDecodeError as error:
                    text = text[: error.start]
                found.append((before + 1, after, text, skipped))
        return found

    def _joined(
        self, ids: np.ndarray, segments: list[tuple[int, int, bytes, int]], encoded: Any
    ) -> tuple[Placed, Placed]:
        ends = np.full(len(ids), NOWHERE)
        theirs: list[np.ndarray] = [np.array(self._lead, dtype=np.int64)]
        their_ends: list[np.ndarray] = [np.full(len(self._lead), NOWHERE)]
        cuts: list[int] = []
        torn: set[int] = set()
        place, starts = 0, {start: (end, text, skipped) for start, end, text, skipped in segments}
        token = 0
        while token < len(ids):
            if token in starts:
                end, text, skipped = starts[token]
                lengths = self.source.lengths[ids[token:end]]
                ends[token:end] = place + np.cumsum(lengths)
                number = np.array(next(encoded), dtype=np.int64)
                said = self.target.text(number)
                extra = int(said[:1] == b" " != text[:1])  # the blank that SentencePiece puts before a text
                same = _common_prefix(said[extra:], text)
                theirs.append(number)
                begin = place + skipped
                reached = _reached(self.target, number, extra)
                their_ends.append(np.where(reached <= same, begin + reached, NOWHERE))
                if skipped:
                    cuts.append(begin)
                    if begin not in ends[token:end]:
                        torn.add(begin)
                place += int(lengths.sum())
                if skipped + same < int(lengths.sum()):
                    inside = ends[token:end]
                    ends[token:end] = np.where(inside <= begin + same, inside, NOWHERE)
                    cuts.append(place)  # what is left over on either side must not run into what follows
                token = end
            elif ids[token] == self._ends[0]:
                place += 1
                ends[token] = place
                theirs.append(np.array([self._ends[1], *self._lead]))
                their_ends.append(np.array([place, *[NOWHERE] * len(self._lead)]))
                token += 1
            else:
                token += 1
        return Placed(ids, ends, cuts, torn), Placed(np.concatenate(theirs), np.concatenate(their_ends))


def _reached(vocabulary: Vocabulary, ids: np.ndarray, extra: int) -> np.ndarray:
    """How many bytes of a text are written after each token; ``extra`` bytes at the beginning are not the text's.

    Tokens that write nothing (a blank of its own before a SentencePiece text) go with the first that does.
    """
    written = np.maximum(np.cumsum(vocabulary.lengths[ids]) - extra, 0)
    return np.maximum(written, written[written > 0].min()) if written.any() else written


def _common_prefix(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with together."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    different = np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    return int(different.argmax())


@dataclass(frozen=True)
class Pairing:
    """Teacher's and student's vocabularies, and how batches of both are made.

    Args:
        window: most tokens of a student's sequence; what is beyond is left out.
        unbiased: which pairs of tokens a chunk may end with; by default all.
    """

    teacher: Vocabulary
    student: Vocabulary
    window: int | None = None
    unbiased: Unbiased | None = None

    def batch(self, rows: Sequence[tuple[Placed, Placed]]) -> dict[str, Any]:
        """A paired batch from (teacher, student) placed tokens."""
        sides: tuple[list[np.ndarray], ...] = ([], [])
        chunks: tuple[list[np.ndarray], ...] = ([], [])
        sizes = []
        for pair in rows:
            lengths = (len(pair[0].ids), min(len(pair[1].ids), self.window or len(pair[1].ids)))
            numbers = kept_within(*chunks_of(*pair, unbiased=self.unbiased), lengths)
            for side, (placed, number) in enumerate(zip(pair, numbers, strict=True)):
                sides[side].append(placed.ids[: lengths[side]])
                chunks[side].append(number)
            sizes.append([int(self.teacher.lengths[pair[0].ids[numbers[0] >= 0]].sum())])
        teacher, student = (
            _padded(ids, number, vocabulary)
            for ids, number, vocabulary in zip(sides, chunks, (self.teacher, self.student), strict=True)
        )
        return {**student, "bytes": torch.tensor(sizes), "teacher": teacher}


def _padded(rows: list[np.ndarray], chunks: list[np.ndarray], vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    pad = vocabulary.role("pad_token_id")
    length = max(map(len, rows))
    ids_BT = np.full((len(rows), length), vocabulary.tokenizer.eos_token_id if pad is None else pad)
    chunks_BT, mask_BT = np.full((len(rows), length), NOWHERE), np.zeros((len(rows), length), dtype=np.int64)
    for row, (ids, number) in enumerate(zip(rows, chunks, strict=True)):
        ids_BT[row, : len(ids)], chunks_BT[row, : len(ids)], mask_BT[row, : len(ids)] = ids, number, 1
    found = {"input_ids": ids_BT, "attention_mask": mask_BT, "loss_mask": chunks_BT >= 0, "chunks": chunks_BT}
    return {name: torch.from_numpy(values).long() for name, values in found.items()}


class PairedWindows:
    """Windows of a teacher's tokens with the student's of the same text; ``paired[[3, 5]]`` is a paired batch."""

    def __init__(self, windows: Any, pairing: Pairing) -> None:
        self.windows, self.pairing = windows, pairing
        self.translate = Translator(pairing.teacher, pairing.student)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Sequence[int]) -> dict[str, Any]:
        rows = self.windows[index]["input_ids"].numpy()
        return self.pairing.batch(self.translate(list(rows)))


Side = Mapping[str, np.ndarray]


class PairedConversations:
    """Conversations written with each model's own template, their responses aligned.

    Args:
        teacher, student: ``input_ids`` and ``loss_mask``, a row of each a conversation.
    """

    def __init__(self, teacher: Sequence[Side], student: Sequence[Side], pairing: Pairing) -> None:
        self.rows, self.pairing = list(zip(teacher, student, strict=True)), pairing

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, begin: int, end: int | None) -> PairedConversations:
        """Some of them."""
        teacher, student = zip(*self.rows[begin:end], strict=True)
        return PairedConversations(teacher, student, self.pairing)

    def __getitem__(self, index: Sequence[int]) -> dict[str, Any]:
        vocabularies = (self.pairing.teacher, self.pairing.student)
        return self.pairing.batch([placed_responses(self.rows[number], vocabularies) for number in index])


def placed_responses(sides: tuple[Side, Side], vocabularies: tuple[Vocabulary, Vocabulary]) -> tuple[Placed, Placed]:
    """Both sides of a conversation with their responses placed: what is said first, then what ends the turn.

    What both sides say is what their responses begin with together; what comes after it (``<|im_end|>`` on one side,
    ``<eos>`` on the other) is one place.
    """
    placed = tuple(Placed(side["input_ids"], np.full(len(side["input_ids"]), NOWHERE)) for side in sides)
    runs = [_runs(side["loss_mask"]) for side in sides]
    place = 0
    if len(runs[0]) != len(runs[1]):  # a template leaves a turn out: there is no telling which
        return placed[0], placed[1]
    for spans in zip(*runs, strict=True):
        said, marked = [], []
        for side, (begin, end), vocabulary in zip(sides, spans, vocabularies, strict=True):
            ids = side["input_ids"][begin:end]
            stop = int(np.append(np.flatnonzero(vocabulary.special[ids]), len(ids))[0])
            said.append(vocabulary.text(ids[:stop]))
            marked.append(stop < len(ids))
        blank = [int(one[:1] == b" " != other[:1]) for one, other in (said, said[::-1])]
        same = _common_prefix(*(one[extra:] for one, extra in zip(said, blank, strict=True)))
        for one, (begin, end), extra, vocabulary in zip(placed, spans, blank, vocabularies, strict=True):
            reached = _reached(vocabulary, one.ids[begin:end], extra)
            special = np.maximum.accumulate(vocabulary.special[one.ids[begin:end]])
            counted = np.where((reached <= same) & ~special, place + reached, NOWHERE)
            if all(marked) and same == len(said[0]) - blank[0] == len(said[1]) - blank[1]:
                counted[special] = NOWHERE
                counted[int(special.argmax())] = place + same + 1
            one.ends[begin:end] = counted
            one.cuts.append(place + same + 2)
        place += same + 2
    return placed[0], placed[1]


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """From where to where a mask is 1."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int64), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def paired_conversations(
    documents: Any, pairing: Pairing, *, windows: tuple[int, int], name: str, seed: int
) -> PairedConversations:
    """Conversations in both tokenizers, in an order shuffled by ``seed``; those that do not fit one side are left out.

    Raises:
        DataError: none fits.
    """
    found = []
    for vocabulary, window in zip((pairing.teacher, pairing.student), windows, strict=True):
        rows: dict[int, Side] = {}
        for start in range(0, len(documents), 256):
            numbers = list(range(start, min(start + 256, len(documents))))
            columns = encode_conversations(vocabulary.tokenizer, name, window, documents[numbers], numbers)
            for place, document in enumerate(columns["document"]):
                length = int(columns["attention_mask"][place].sum())
                kept = {key: columns[key][place][:length] for key in ("input_ids", "loss_mask")}
                rows[int(document[0])] = kept
        found.append(rows)
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        raise DataError(
            f"{name}: none of {len(documents)} conversations has a response within {windows[0]} tokens of the teacher "
            f"and {windows[1]} of the student; use larger windows"
        )
    order = [both[place] for place in np.random.default_rng(seed).permutation(len(both))]
    return PairedConversations([found[0][n] for n in order], [found[1][n] for n in order], pairing)


class Paired(Wrapped):
    """Batches of a source of the student's ids (its own text, say) with the teacher's tokens of the same text.

    Any source and any objective of `stillhouse.objectives.cross_tokenizer` go together so: what the student writes is
    put into the teacher's tokens, and aligned. Only what the batch's ``loss_mask`` names counts, if it has one.
    """

    def __init__(self, source: Source, pairing: Pairing) -> None:
        super().__init__(source)
        self.pairing = pairing
        self.translate = Translator(pairing.student, pairing.teacher)

    def __next__(self) -> dict[str, Any]:
        batch = next(self.source)
        ids_BT = batch["input_ids"].cpu().numpy()
        lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(-1).tolist()  # padded right
        placed = self.translate([ids[:length] for ids, length in zip(ids_BT, lengths, strict=True)])
        made = self.pairing.batch([(teacher, student) for student, teacher in placed])
        if "loss_mask" in batch:
            self._only(made, batch["loss_mask"].cpu())
        return {**{key: value for key, value in batch.items() if key not in made}, **made}

    def _only(self, batch: dict[str, Any], mask_BT: torch.Tensor) -> None:
        """Leave out the chunks of a paired batch that hold a token the student's mask does not name."""
        lengths = torch.from_numpy(self.pairing.student.lengths)
        for row, chunks in enumerate(batch["chunks"].clone()):
            outside = chunks[mask_BT[row, : len(chunks)] == 0]
            for side in (batch, batch["teacher"]):
                side["chunks"][row][torch.isin(side["chunks"][row], outside)] = NOWHERE
                side["loss_mask"][row] = (side["chunks"][row] >= 0).long()
            batch["bytes"][row] = lengths[batch["input_ids"][row][batch["chunks"][row] >= 0]].sum()

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)
