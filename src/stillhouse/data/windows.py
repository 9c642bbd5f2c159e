"""Tokens in windows of one length: what a language model is trained on, chosen by and measured on.

Plain text becomes one stream, every document ended by EOS, cut into windows of T tokens; a window gives T - 1
predictions. Conversations become one padded example a window, with a mask on the tokens of the responses.
``datasets`` tokenises, and keeps the tokens beside documents that lie on disk. Suffixes: ``_T`` window length,
``_N`` number of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from stillhouse.base.errors import DataError
from stillhouse.data.encoding import (
    CHAT_COLUMNS,
    Turns,
    digest,
    encode_conversations,
    encode_documents,
    tokenizer_fingerprint,
)
from stillhouse.data.records import Kind
from stillhouse.data.text import TextData

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT = 4  # part of every fingerprint; raise it when the same input gives other windows


class WindowSplit:
    """Windows of one split, map-style: ``split[3]`` gives tensors (T,), ``split[[3, 5]]`` gives (2, T).

    Every item is a dict of int64 tensors: ``input_ids``, and for conversations also ``attention_mask`` (1 on tokens,
    0 on padding) and ``loss_mask`` (1 on tokens of a response; position 0 is never predicted). Packed ones have
    ``position_ids`` instead of the attention mask: they begin at 0 with every conversation, and with the padding.
    """

    def __init__(self, columns_NT: dict[str, torch.Tensor]) -> None:
        self._columns_NT = columns_NT

    def __len__(self) -> int:
        return len(self._columns_NT["input_ids"])

    def __getitem__(self, index: int | Sequence[int] | slice) -> dict[str, torch.Tensor]:
        return {name: column_NT[index].long() for name, column_NT in self._columns_NT.items()}


@dataclass(frozen=True)
class Counts:
    """What went into the windows.

    Attributes:
        train_tokens: tokens in the training windows, padding left out.
        validation_tokens: predicted tokens of the validation windows (of conversations: of their responses).
        validation_bytes: UTF-8 bytes of text that these tokens stand for; special tokens stand for none.
        left_over: tokens at the ends of the streams that do not fill a window.
        truncated: examples cut at the window's end, their response kept in part.
        dropped: examples of whose response nothing is left in the window, or that have none.
    """

    train_tokens: int = 0
    validation_tokens: int = 0
    validation_bytes: int = 0
    left_over: int = 0
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Windows:
    """Windows to train on, to choose by (``selection``) and to report on (``validation``), with their counts.

    Bits per byte of a model = summed validation loss in nats / ln 2 / ``validation_bytes``; see :class:`Counts`.
    """

    train: WindowSplit
    selection: WindowSplit
    validation: WindowSplit
    window: int
    kind: Kind
    name: str
    fingerprint: str
    counts: Counts
    documents: tuple[int, ...] = ()  # of conversations: which records the training windows come from

    @property
    def validation_tokens(self) -> int:
        return self.counts.validation_tokens

    @property
    def validation_bytes(self) -> int:
        return self.counts.validation_bytes

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text per predicted token."""
        return self.counts.validation_bytes / self.counts.validation_tokens


_Columns = dict[str, torch.Tensor]
_Splits = tuple[_Columns, _Columns, _Columns, Counts]  # the training columns may have ``document``


def tokenize_windows(
    data: TextData,
    tokenizer: Tokenizer,
    *,
    window: int,
    validation: float | int = 0.05,
    selection: float | int = 0,
    packing: bool = False,
    seed: int = 0,
) -> Windows:
    """Tokenise documents into windows of ``window`` tokens, some of them held out.

    Text: the documents, in an order shuffled by ``seed``, each ended by EOS (and begun by BOS if the tokenizer itself
    does so), are one stream that is cut into windows. Whole documents are held out; where none fit (a single document,
    a few long ones), the end of the stream is.

    Prompt-completion and messages: one example a window, padded. The tokenizer's chat template is used, or
    :data:`~stillhouse.data.encoding.FALLBACK_TEMPLATE` if it has none. Longer examples lose their right end.

    The windows are held in memory, 4 bytes a token (6 for conversations).

    Args:
        validation: held out to report on: a share of the tokens (of the examples, for conversations) in (0, 1), or a
            number of windows. It does not depend on ``selection``.
        selection: held out to choose by, of the rest: which weights to keep, when to stop. 0 holds out nothing.
        packing: put several conversations into a training window, by best fit. What is held out stays one a window.

    Raises:
        DataError: too little text for one training window and those held out, a tokenizer without EOS or character
            offsets, a conversation the chat template refuses, or an option out of range.
    """
    if window < 2:
        raise DataError(f"window={window}: must be at least 2 tokens, one to read and one to predict")
    if validation <= 0 or (isinstance(validation, float) and validation >= 1):
        raise DataError(f"validation={validation}: must be a share between 0 and 1, or a whole number from 1")
    if selection < 0 or (isinstance(selection, float) and selection >= 1):
        raise DataError(f"selection={selection}: must be a share from 0 to below 1, or a whole number")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which must end every document; set tokenizer.eos_token")
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; use one with a tokenizer.json"
        )
    source = digest(FORMAT, data.fingerprint, data.kind, data.skipped, tokenizer_fingerprint(tokenizer))
    cut = _text_windows if data.kind == "text" else _chat_windows
    *columns, counts = cut(data, tokenizer, source, window, validation, selection, seed)
    documents = columns[0].pop("document", torch.zeros(0)).flatten().tolist()
    if packing and data.kind != "text":
        columns[0] = packed(columns[0])
    train, chosen_by, held_out = map(WindowSplit, columns)
    fingerprint = digest(source, window, validation, selection, seed, *(["packed"] if packing else []))
    return Windows(train, chosen_by, held_out, window, data.kind, data.name, fingerprint, counts, tuple(documents))


def conversation_windows(
    conversations: Sequence[Turns], tokenizer: Tokenizer, *, window: int, name: str
) -> WindowSplit:
    """Conversations one a window, none held out; those without a response in their window are left out."""
    import datasets

    rows = datasets.Dataset.from_list([{"messages": list(turns)} for turns in conversations])
    found, *_ = _encoded(rows, tokenizer, window, name, None)
    if not len(found["input_ids"]):
        raise DataError(f"{name}: none of {len(rows)} conversations has a response within {window} tokens")
    return WindowSplit({key: found[key] for key in ("input_ids", "attention_mask", "loss_mask")})


def _text_windows(
    data: TextData, tokenizer: Tokenizer, source: str, T: int, validation: float, selection: float, seed: int
) -> _Splits:
    import datasets

    column = datasets.LargeList(datasets.Value("int32"))
    tokens = data.documents.map(
        partial(encode_documents, tokenizer),
        batched=True,
        batch_size=256,
        remove_columns=["text"],
        features=datasets.Features({"input_ids": column, "sizes": column}),
        new_fingerprint=source,
        desc="Tokenising",
    )
    order = np.random.default_rng(seed).permutation(len(tokens))
    stream, lengths = _flat(tokens.select(order), "input_ids")
    chosen_by, least = _least(selection), _least(validation)
    if len(stream) < (1 + chosen_by + least) * T:
        also = f", {chosen_by} selection" if chosen_by else ""
        raise DataError(
            f"{data.name}: too little text: {len(stream):,} tokens, but one training{also} and {least} validation "
            f"window{'s' if least > 1 else ''} of {T} need {(1 + chosen_by + least) * T:,}; use a smaller window or "
            "more text"
        )
    held_out = _held_out(lengths, validation, len(stream), T, keep=(1 + chosen_by) * T)
    rest, rest_lengths, held_out_NT = _split(stream, lengths, held_out, validation, T)
    chosen = _held_out(rest_lengths, selection, len(stream), T, keep=T)
    train, _, selection_NT = _split(rest, rest_lengths, chosen, selection, T)
    train_NT = _cut(train, T)
    documents, start = held_out
    sizes_NT = _cut(_flat(tokens.select(order[documents]), "sizes")[0][start:], T)[: len(held_out_NT)]
    counts = Counts(
        train_tokens=train_NT.size,
        validation_tokens=held_out_NT[:, 1:].size,
        validation_bytes=int(sizes_NT[:, 1:].sum()),
        left_over=len(stream) - train_NT.size - selection_NT.size - held_out_NT.size,
    )
    columns = [{"input_ids": torch.from_numpy(windows_NT)} for windows_NT in (train_NT, selection_NT, held_out_NT)]
    return columns[0], columns[1], columns[2], counts


def _least(wanted: float) -> int:
    """The windows that must be held out: as many as asked for, or one for a share."""
    return wanted if isinstance(wanted, int) else 1 if wanted else 0


def _target(wanted: float, total: int, T: int) -> int:
    """The tokens to hold out of ``total``."""
    return wanted * T if isinstance(wanted, int) else max(T, round(wanted * total)) if wanted else 0


def _split(
    stream: np.ndarray, lengths: np.ndarray, held_out: tuple[np.ndarray, int], wanted: float, T: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stream without what is held out, the lengths of its pieces, and the windows of what is."""
    documents, start = held_out
    inside = np.repeat(documents, lengths)
    rest = np.concatenate([stream[~inside], stream[inside][:start]])
    windows_NT = _cut(stream[inside][start:], T)[: wanted if isinstance(wanted, int) else None]
    return rest, np.array([*lengths[~documents], start], dtype=lengths.dtype), windows_NT


def _held_out(lengths: np.ndarray, wanted: float, total: int, T: int, *, keep: int) -> tuple[np.ndarray, int]:
    """Which documents hold what is held out, as a mask, and where in them it begins; ``keep`` tokens are left.

    Whole documents, but none larger than twice the target, or one book among notes would be all of it; if that cannot
    be, the end of the stream.
    """
    target = min(_target(wanted, total, T), int(lengths.sum()) - keep)
    chosen, held = np.zeros(len(lengths), dtype=bool), 0
    if not target:
        return chosen, 0
    for index, length in enumerate(lengths.tolist()):
        if length <= 2 * target - held:
            chosen[index] = True
            held += length
        if held >= target:
            break
    if not target <= held <= lengths.sum() - keep:
        chosen, held = np.cumsum(lengths) > lengths.sum() - target, target
    return chosen, int(lengths[chosen].sum()) - held


def _chat_windows(
    data: TextData, tokenizer: Tokenizer, source: str, T: int, validation: float, selection: float, seed: int
) -> _Splits:
    found, usable = _encoded(data.documents, tokenizer, T, data.name, digest(source, T), seed)
    total = len(data.documents)
    wanted, chosen_by = _target(validation, total, 1), _target(selection, total, 1)
    if usable <= wanted + chosen_by:
        also = f", {chosen_by} for selection" if chosen_by else ""
        raise DataError(
            f"{data.name}: {total} examples, {total - usable} of them dropped as too long or without a response, "
            f"cannot give {wanted} for validation{also} and one for training; use a larger window or more data"
        )
    sizes, truncated, document = found.pop("sizes")[:wanted], found.pop("truncated"), found.pop("document")
    train = {name: column[wanted + chosen_by :] for name, column in {**found, "document": document}.items()}
    chosen = {name: column[wanted : wanted + chosen_by] for name, column in found.items()}
    held_out = {name: column[:wanted] for name, column in found.items()}
    predicted = held_out["loss_mask"][:, 1:] == 1
    counts = Counts(
        train_tokens=int(train["attention_mask"].sum()),
        validation_tokens=int(predicted.sum()),
        validation_bytes=int(sizes[:, 1:][predicted].sum()),
        truncated=int(truncated.sum()),
        dropped=total - usable,
    )
    return train, chosen, held_out, counts


def _encoded(
    documents: datasets.Dataset,
    tokenizer: Tokenizer,
    T: int,
    name: str,
    fingerprint: str | None,
    seed: int | None = None,
) -> tuple[_Columns, int]:
    """The columns of usable conversations, shuffled if there is a seed, and how many they are."""
    import datasets

    features = {column: datasets.LargeList(datasets.Value(dtype)) for column, dtype in CHAT_COLUMNS.items()}
    examples = documents.map(
        partial(encode_conversations, tokenizer, name, T),
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=documents.column_names,
        features=datasets.Features(features),
        new_fingerprint=fingerprint,
        desc="Tokenising",
    )
    usable = len(examples)
    if seed is not None:
        examples = examples.select(np.random.default_rng(seed).permutation(usable))
    width = {"truncated": 1, "document": 1}
    return {
        column: torch.from_numpy(_flat(examples, column)[0]).view(usable, width.get(column, T))
        for column in CHAT_COLUMNS
    }, usable


def packed(columns_NT: _Columns) -> _Columns:
    """Padded examples, several to a window of the same length: each goes where it leaves the least room.

    Longest first (best fit decreasing). ``position_ids`` begin at 0 with every example, which is how ``transformers``
    keeps them apart, and with the padding.
    """
    length_N = columns_NT["attention_mask"].sum(-1)
    T = columns_NT["input_ids"].shape[1]
    rooms: list[list[int]] = [[] for _ in range(T + 1)]  # windows by the room that is left in them
    windows: list[list[int]] = []
    for example in torch.argsort(length_N, descending=True, stable=True).tolist():
        length = int(length_N[example])
        room = next((room for room in range(length, T + 1) if rooms[room]), None)
        if room is None:
            room, place = T, len(windows)
            windows.append([])
        else:
            place = rooms[room].pop()
        windows[place].append(example)
        rooms[room - length].append(place)
    padding = columns_NT["input_ids"][columns_NT["attention_mask"] == 0]
    filled = {name: torch.zeros(len(windows), T, dtype=torch.long) for name in ("loss_mask", "position_ids")}
    filled["input_ids"] = torch.full((len(windows), T), int(padding[0]) if len(padding) else 0)
    for row, examples in enumerate(windows):
        start = 0
        for example in examples:
            end = start + int(length_N[example])
            for name in ("input_ids", "loss_mask"):
                filled[name][row, start:end] = columns_NT[name][example, : end - start]
            filled["position_ids"][row, start:end] = torch.arange(end - start)
            filled["loss_mask"][row, start] = 0  # nothing of its own stands before it
            start = end
        filled["position_ids"][row, start:] = torch.arange(T - start)
    return filled


def _cut(stream: np.ndarray, T: int) -> np.ndarray:
    """The whole windows of a stream, one a row."""
    return stream[: len(stream) // T * T].reshape(-1, T)


def _flat(tokens: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All lists of a column one after the other, and their lengths."""
    import pyarrow.compute as pc

    lists = tokens.with_format("arrow")[:][column]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()
