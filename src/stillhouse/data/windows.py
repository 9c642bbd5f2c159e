"""Tokens in windows of one length: what a language model is trained and measured on.

Plain text becomes one stream, every document ended by EOS, cut into windows of T tokens; a window gives T - 1
predictions. Conversations become one padded example a window, with a mask on the tokens of the responses.
``datasets`` tokenises, and keeps the tokens beside documents that lie on disk. Suffixes: ``_T`` window length,
``_N`` number of windows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stillhouse.base.errors import DataError
from stillhouse.data.records import Kind
from stillhouse.data.text import TextData

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # part of every fingerprint; raise it when the same input gives other windows
PIECE = 1 << 16  # characters; longer documents are tokenised in pieces, so that memory stays bounded

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: ``### User:``, the text, ``### Assistant:``, the text, EOS."""


class WindowSplit:
    """Windows of one split, map-style: ``split[3]`` gives tensors (T,), ``split[[3, 5]]`` gives (2, T).

    Every item is a dict of int64 tensors: ``input_ids``, and for conversations also ``attention_mask`` (1 on tokens,
    0 on padding) and ``loss_mask`` (1 on tokens of a response; position 0 is never predicted).
    """

    def __init__(self, arrays_NT: dict[str, np.ndarray]) -> None:
        self._arrays_NT = arrays_NT

    def __len__(self) -> int:
        return len(self._arrays_NT["input_ids"])

    def __getitem__(self, index: int | Sequence[int] | slice) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array_NT[index].astype(np.int64)) for name, array_NT in self._arrays_NT.items()}


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
    """Training and validation windows with their counts (see :class:`Counts`).

    Bits per byte of a model = summed validation loss in nats / ln 2 / ``validation_bytes``.
    """

    train: WindowSplit
    validation: WindowSplit
    window: int
    kind: Kind
    name: str
    fingerprint: str
    counts: Counts

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

    def describe(self) -> str:
        """One line for people: sizes, and what was left out."""
        line = (
            f"{self.name}: {len(self.train):,} training and {len(self.validation):,} validation windows of "
            f"{self.window} tokens ({self.bytes_per_token:.2f} bytes per token)"
        )
        if self.counts.truncated or self.counts.dropped:
            line += f"; {self.counts.truncated:,} examples truncated, {self.counts.dropped:,} dropped as too long"
        return line


def tokenize_windows(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    validation: float | int = 0.05,
    seed: int = 0,
) -> Windows:
    """Tokenise documents into windows of ``window`` tokens, some of them held out for validation.

    Text: the documents, in an order shuffled by ``seed``, each ended by EOS (and begun by BOS if the tokenizer itself
    does so), are one stream that is cut into windows. Whole documents are held out; where none fit (a single document,
    a few long ones), the end of the stream is.

    Prompt-completion and messages: one example a window, padded. The tokenizer's chat template is used, or
    :data:`FALLBACK_TEMPLATE` if it has none. Longer examples lose their right end.

    The windows are held in memory, 4 bytes a token (6 for conversations).

    Args:
        validation: share of the tokens (of the examples, for conversations) in (0, 1), or a number: of windows.

    Raises:
        DataError: too little text for one training and one validation window, a tokenizer without EOS or character
            offsets, a conversation the chat template refuses, or an option out of range.
    """
    if window < 2:
        raise DataError(f"window={window}: must be at least 2 tokens, one to read and one to predict")
    if validation <= 0 or (isinstance(validation, float) and validation >= 1):
        raise DataError(f"validation={validation}: must be a share between 0 and 1, or a whole number from 1")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which must end every document; set tokenizer.eos_token")
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; use one with a tokenizer.json"
        )
    source = _digest(FORMAT, data.fingerprint, data.kind, data.skipped, tokenizer_fingerprint(tokenizer))
    cut = _text_windows if data.kind == "text" else _chat_windows
    train, held_out, counts = cut(data, tokenizer, source, window, validation, np.random.default_rng(seed))
    fingerprint = _digest(source, window, validation, seed)
    return Windows(WindowSplit(train), WindowSplit(held_out), window, data.kind, data.name, fingerprint, counts)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of everything in a fast tokenizer that decides which ids a text gets."""
    known = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return _digest(known, tokenizer.chat_template, tokenizer.special_tokens_map, _lead(tokenizer))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# Encoding


def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS id, for tokenizers that themselves put it before a text; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)


def _locate(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each text: ids, where each token ends (characters), and the UTF-8 bytes it stands for.

    A token ends where its offset says and begins where the one before ended: tokens that share a character (bytes of
    an emoji) and blanks that offsets leave out then count once. Special tokens stand for no bytes.
    """
    called = _call(tokenizer, texts, offsets=True)
    located = []
    for text, ids, offsets in zip(texts, called["input_ids"], called["offset_mapping"], strict=True):
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
        ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
        sizes = np.diff(np.append(0, np.cumsum(widths))[ends], prepend=0)
        sizes[np.isin(ids, tokenizer.all_special_ids)] = 0
        located.append((np.array(ids, dtype=np.int32), ends, sizes))
    return located


def _flat(tokens: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """All lists of a column one after the other, and their lengths."""
    import pyarrow.compute as pc

    lists = tokens.with_format("arrow")[:][column]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()


# Text


def _text_windows(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    T: int,
    validation: float | int,
    random: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Counts]:
    import datasets

    tokens = data.documents.map(
        partial(_encode_documents, tokenizer),
        batched=True,
        batch_size=256,
        remove_columns=["text"],
        features=datasets.Features({"input_ids": datasets.LargeList(datasets.Value("int32"))}),
        new_fingerprint=source,
        desc="Tokenising",
    )
    order = random.permutation(len(tokens))
    stream, lengths = _flat(tokens.select(order), "input_ids")
    least = validation if isinstance(validation, int) else 1
    if len(stream) < (1 + least) * T:
        raise DataError(
            f"{data.name}: too little text: {len(stream):,} tokens, but one training and {least} validation "
            f"window{'s' if least > 1 else ''} of {T} need {(1 + least) * T:,}; use a smaller window or more text"
        )
    share = least * T if isinstance(validation, int) else max(T, round(validation * len(stream)))
    documents, count = _hold_out(lengths, min(share, len(stream) - T), T)
    inside = np.repeat(documents, lengths)
    cut = int(inside.sum()) - count  # these tokens come before what is held out
    train = np.concatenate([stream[~inside], stream[inside][:cut]])
    held_out = stream[inside][cut:]
    sizes = np.concatenate([_document_sizes(tokenizer, text) for text in data.documents.select(order[documents])["text"]])
    windows = len(held_out) // T if isinstance(validation, float) else validation
    train_NT, held_out_NT = train[: len(train) // T * T].reshape(-1, T), held_out[: windows * T].reshape(-1, T)
    counts = Counts(
        train_tokens=train_NT.size,
        validation_tokens=held_out_NT[:, 1:].size,
        validation_bytes=int(sizes[cut:][: windows * T].reshape(-1, T)[:, 1:].sum()),
        left_over=len(stream) - train_NT.size - held_out_NT.size,
    )
    return {"input_ids": train_NT}, {"input_ids": held_out_NT}, counts


def _hold_out(lengths: np.ndarray, target: int, least: int) -> tuple[np.ndarray, int]:
    """Which documents hold what is held out, as a mask, and how many tokens at their end are: at least ``target``.

    Whole documents, but none larger than twice the target, or one book among notes would be all of it, and
    ``least`` tokens must be left to train on; if that cannot be, the end of the stream, whatever begins there.
    """
    chosen, held = np.zeros(len(lengths), dtype=bool), 0
    for index, length in enumerate(lengths.tolist()):
        if length <= 2 * target - held:
            chosen[index] = True
            held += length
        if held >= target:
            break
    if target <= held <= lengths.sum() - least:
        return chosen, held
    return np.cumsum(lengths) > lengths.sum() - target, target


def _pieces(text: str) -> list[str]:
    """A text in pieces that end with a line where they can."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _encode_documents(tokenizer: PreTrainedTokenizerBase, batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
    """The ids of every document with BOS and EOS; none of an empty one."""
    split = [_pieces(text) for text in batch["text"]]
    pieces = [piece for of_one in split for piece in of_one]
    groups = (pieces[start : start + 64] for start in range(0, len(pieces), 64))
    encoded = iter([np.array(ids, np.int32) for group in groups for ids in _call(tokenizer, group)["input_ids"]])
    before, after = _lead(tokenizer), [tokenizer.eos_token_id]
    joined = [np.concatenate([before, *(next(encoded) for _ in of_one), after], dtype=np.int32) for of_one in split]
    return {"input_ids": [ids if text else ids[:0] for text, ids in zip(batch["text"], joined, strict=True)]}


def _document_sizes(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The bytes that the ids of a document stand for."""
    sizes = [size for _, _, size in _locate(tokenizer, _pieces(text))]
    return np.concatenate([np.zeros(len(_lead(tokenizer))), *sizes, [0]] if text else [[]])


# Conversations


def _chat_windows(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    T: int,
    validation: float | int,
    random: np.random.Generator,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Counts]:
    import datasets

    columns = {"input_ids": "int32", "attention_mask": "uint8", "loss_mask": "uint8", "bytes": "int64", "cut": "uint8"}
    examples = data.documents.map(
        partial(_encode_conversations, tokenizer, data.name, T),
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=data.documents.column_names,
        features=datasets.Features({name: datasets.List(datasets.Value(dtype)) for name, dtype in columns.items()}),
        new_fingerprint=_digest(source, T),
        desc="Tokenising",
    )
    total = len(data.documents)
    wanted = validation if isinstance(validation, int) else max(1, round(validation * total))
    if len(examples) <= wanted:
        raise DataError(
            f"{data.name}: {total} examples, {total - len(examples)} of them dropped as too long or without a response, "
            f"cannot give {wanted} for validation and one for training; use a larger window or more data"
        )
    shuffled = examples.select(random.permutation(len(examples)))
    found = {name: _flat(shuffled, name)[0].reshape(len(examples), -1) for name in columns}
    held_out, train = ({name: array[part] for name, array in found.items()} for part in (slice(wanted), slice(wanted, None)))
    counts = Counts(
        train_tokens=int(train["attention_mask"].sum()),
        validation_tokens=int(held_out["loss_mask"][:, 1:].sum()),
        validation_bytes=int(held_out["bytes"].sum()),
        truncated=int(found["cut"].sum()),
        dropped=total - len(examples),
    )
    return train, held_out, counts
