"""Tokens in windows of one length: what a language model is trained and measured on.

Plain text becomes one stream, every document ended by EOS, cut into windows of T tokens; a window gives T - 1
predictions. Conversations become one padded example a window, with a mask on the tokens of the responses.
Suffixes: ``_T`` window length, ``_N`` number of windows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from stillhouse.base.errors import DataError
from stillhouse.base.files import whole_file, write_json
from stillhouse.data.text import Kind, TextData

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

FORMAT = 1  # part of every fingerprint; raise it when the same input gives other windows
ROWS = 1024  # windows in one record batch
BATCH_DOCUMENTS, BATCH_BYTES = 512, 1 << 20  # given to the tokenizer at once
LONGEST_PIECE = 1 << 18  # characters; longer documents are tokenised in pieces
SAMPLE_BYTES = 256 << 10
COLUMNS = {"input_ids": np.int32, "attention_mask": np.uint8, "loss_mask": np.uint8}

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: ``### User:``, the text, ``### Assistant:``, the text, EOS."""


class WindowSplit:
    """Windows of one split, map-style: ``split[3]`` gives tensors (T,), ``split[[3, 5]]`` gives (2, T).

    Every item is a dict of int64 tensors: ``input_ids``, and for conversations also ``attention_mask`` (1 on
    tokens, 0 on padding) and ``loss_mask`` (1 on tokens of a response; position 0 is never predicted).
    """

    def __init__(self, chunks: dict[str, list[np.ndarray]]) -> None:
        self._chunks = chunks  # each array (ROWS, T), the last one shorter
        self._length = sum(len(chunk) for chunk in chunks["input_ids"])

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(self._length))

    def __getitem__(self, index: int | Sequence[int] | slice) -> dict[str, torch.Tensor]:
        if isinstance(index, slice):
            index = range(*index.indices(self._length))
        if isinstance(index, Sequence | torch.Tensor | np.ndarray):
            rows = [self._position(int(one)) for one in index]
            return {name: self._gather(chunks, rows) for name, chunks in self._chunks.items()}
        chunk, row = self._position(int(index))
        return {name: torch.from_numpy(chunks[chunk][row].astype(np.int64)) for name, chunks in self._chunks.items()}

    def _position(self, index: int) -> tuple[int, int]:
        if not -self._length <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        return divmod(index % self._length, ROWS)

    @staticmethod
    def _gather(chunks: list[np.ndarray], rows: list[tuple[int, int]]) -> torch.Tensor:
        out = np.empty((len(rows), chunks[0].shape[1] if chunks else 0), dtype=np.int64)
        for at, (chunk, row) in enumerate(rows):
            out[at] = chunks[chunk][row]
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Counts:
    """What went into the windows.

    Attributes:
        train_tokens: tokens in the training windows, padding left out.
        validation_tokens: predicted tokens of the validation windows (of conversations: of their responses).
        validation_bytes: UTF-8 bytes of text that these tokens stand for; special tokens stand for none.
        left_over: tokens at the ends of the streams that do not fill a window, or beyond ``max_tokens``.
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


@dataclass(frozen=True)
class _Options:
    window: int
    validation: float | int
    seed: int
    max_tokens: int | None
    pack: bool


def tokenize_windows(
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    validation: float | int = 0.05,
    seed: int = 0,
    cache_dir: Path | None = None,
    max_tokens: int | None = None,
    pack: bool = False,
) -> Windows:
    """Tokenise documents into windows of ``window`` tokens, some of them held out for validation.

    Text: the documents, in an order shuffled by ``seed``, each ended by EOS (and begun by BOS if the tokenizer
    itself does so), are one stream that is cut into windows. Whole documents are held out; of a single
    document (or of a few very unequal ones) the end of the longest is.

    Prompt-completion and messages: one example a window, padded. The tokenizer's chat template is used, or
    :data:`FALLBACK_TEMPLATE` if it has none. Longer examples lose their right end. ``pack=True`` puts several
    examples into one window, one after the other; nothing keeps a later one from attending to an earlier one.

    Args:
        validation: share of the text in (0, 1), or a number: of windows for text, of examples otherwise.
        cache_dir: keep the windows there as memory-mapped Arrow (readable by ``Dataset.from_file``), and reuse
            them when data, tokenizer and options are the same. Without it they are held in memory.
        max_tokens: use about this many tokens at most, validation included.

    Raises:
        DataError: too little text for one training and one validation window, a tokenizer without EOS or
            character offsets, a conversation the chat template refuses, or an option out of range.
    """
    options = _Options(window, validation, seed, max_tokens, pack)
    _check_options(options, tokenizer)
    fingerprint = _fingerprint(data, tokenizer, options)
    if cache_dir is None:
        counts, *sinks = _build(data, tokenizer, options)
        train, held_out = (WindowSplit(sink.chunks) for sink in sinks)
    else:
        folder = Path(cache_dir).expanduser() / f"windows-{fingerprint[:32]}"
        counts, train, held_out = _recall(folder) or _store(data, tokenizer, options, folder)
    return Windows(
        train=train,
        validation=held_out,
        window=window,
        kind=data.kind,
        name=data.name,
        fingerprint=fingerprint,
        counts=counts,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of everything in a tokenizer that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        known = json.loads(backend.to_str())
        known = {key: value for key, value in known.items() if key not in ("truncation", "padding")}
    else:
        known = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    known["stillhouse"] = [tokenizer.chat_template, str(tokenizer.special_tokens_map), _lead(tokenizer)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _check_options(options: _Options, tokenizer: PreTrainedTokenizerBase) -> None:
    if options.window < 2:
        raise DataError(f"window={options.window}: must be at least 2 tokens, one to read and one to predict")
    share = isinstance(options.validation, float)
    if options.validation <= 0 or (share and options.validation >= 1):
        raise DataError(f"validation={options.validation}: must be a share between 0 and 1, or a whole number from 1")
    least = options.window * (2 if share else 1 + int(options.validation))
    if options.max_tokens is not None and options.max_tokens < least:
        raise DataError(
            f"max_tokens={options.max_tokens}: too few for validation={options.validation} and one training "
            f"window of {options.window} tokens; use at least {least}"
        )
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, which must end every document; set tokenizer.eos_token")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; use one with a tokenizer.json"
        )


def _fingerprint(data: TextData, tokenizer: PreTrainedTokenizerBase, options: _Options) -> str:
    known = [FORMAT, data.fingerprint, data.kind, data.skipped, tokenizer_fingerprint(tokenizer), asdict(options)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


# Building and keeping


def _build(
    data: TextData, tokenizer: PreTrainedTokenizerBase, options: _Options, paths: tuple[Path, Path] | None = None
) -> tuple[Counts, _Sink, _Sink]:
    columns = list(COLUMNS)[:1] if data.kind == "text" else list(COLUMNS)
    first, second = paths or (None, None)
    with _Sink(first, options.window, columns) as train, _Sink(second, options.window, columns) as held_out:
        fill = _fill_from_text if data.kind == "text" else _fill_from_chat
        counts = fill(data, tokenizer, options, train, held_out)
    return counts, train, held_out


def _store(
    data: TextData, tokenizer: PreTrainedTokenizerBase, options: _Options, folder: Path
) -> tuple[Counts, WindowSplit, WindowSplit]:
    """Write the windows. Two processes that do so at once write the same bytes, so neither harms the other."""
    with whole_file(folder / "train.arrow") as first, whole_file(folder / "validation.arrow") as second:
        counts, train, held_out = _build(data, tokenizer, options, (first, second))
    known = {"counts": asdict(counts), "train": train.length, "validation": held_out.length}
    write_json(folder / "windows.json", known)  # last: windows without it do not count
    stored = _recall(folder)
    if stored is None:
        raise DataError(f"{folder}: the windows written there cannot be read back; check the disk")
    return stored


def _recall(folder: Path) -> tuple[Counts, WindowSplit, WindowSplit] | None:
    """The windows of a finished folder; None if it is missing or damaged, so that it is made again."""
    import pyarrow as pa

    try:
        known = json.loads((folder / "windows.json").read_text(encoding="utf-8"))
        train, held_out = (WindowSplit(_mapped(folder / f"{name}.arrow")) for name in ("train", "validation"))
        if (len(train), len(held_out)) == (known["train"], known["validation"]):
            return Counts(**known["counts"]), train, held_out
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        pass
    return None


def _mapped(path: Path) -> dict[str, list[np.ndarray]]:
    """The columns of an Arrow file as arrays that lie in the mapped file itself."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        table = reader.read_all()
    return {name: [_array(chunk) for chunk in table.column(name).chunks] for name in table.column_names}


def _array(chunk: pa.FixedSizeListArray) -> np.ndarray:
    return chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1)


class _Sink:
    """Takes windows a few at a time and keeps them in batches of ROWS: in memory, or in an Arrow file."""

    def __init__(self, path: Path | None, window: int, columns: list[str]) -> None:
        import pyarrow as pa

        self.columns = columns
        self.window = window
        self.chunks: dict[str, list[np.ndarray]] = {name: [] for name in columns}  # filled only in memory
        self.length = 0
        self._pending: dict[str, list[np.ndarray]] = {name: [] for name in columns}
        self._file = None if path is None else path.open("wb")
        self._schema = pa.schema([(name, pa.list_(pa.from_numpy_dtype(COLUMNS[name]), window)) for name in columns])
        self._writer = None if self._file is None else pa.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._pending["input_ids"] and kind is None:
            self._flush()
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.close()

    def add(self, *values_NT: np.ndarray) -> None:
        """Windows, one array (N, T) per column."""
        if len(values_NT[0]) == 0:
            return
        self.length += len(values_NT[0])
        for name, value in zip(self.columns, values_NT, strict=True):
            self._pending[name].append(value.astype(COLUMNS[name]))
        while sum(map(len, self._pending["input_ids"])) >= ROWS:
            self._flush()

    def _flush(self) -> None:
        joined = {name: np.concatenate(values) for name, values in self._pending.items()}
        self._pending = {name: [value[ROWS:]] if len(value) > ROWS else [] for name, value in joined.items()}
        batch = {name: value[:ROWS] for name, value in joined.items()}
        if self._writer is None:
            for name, value in batch.items():
                self.chunks[name].append(value)
        else:
            self._writer.write_batch(self._as_arrow(batch))

    def _as_arrow(self, batch: dict[str, np.ndarray]) -> pa.RecordBatch:
        import pyarrow as pa

        lists = [
            pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(value).reshape(-1)), value.shape[1])
            for value in batch.values()
        ]
        return pa.record_batch(lists, schema=self._schema)


# Encoding


@dataclass(frozen=True)
class _Encoded:
    """Ids of one text, where each token ends in it (characters), and the UTF-8 bytes each token stands for."""

    ids: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray


def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS id, for tokenizers that themselves put it before a text; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, without special tokens around it."""
    return [np.asarray(ids, dtype=np.int32) for ids in _call(tokenizer, texts)["input_ids"]]


def _encode_located(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Encoded]:
    """Like :func:`_encode`, with the place and the size of every token."""
    called = _call(tokenizer, texts, offsets=True)
    special = np.asarray(sorted(tokenizer.all_special_ids))
    found = zip(texts, called["input_ids"], called["offset_mapping"], strict=True)
    return [_locate(text, ids, offsets, special) for text, ids, offsets in found]


def _locate(text: str, ids: list[int], offsets: list[tuple[int, int]], special: np.ndarray) -> _Encoded:
    """A token ends where its offset says and begins where the one before ended.

    Tokens that share a character (bytes of an emoji) and blanks that offsets leave out then count once.
    """
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
    sizes = np.diff(_byte_positions(text)[ends], prepend=0)
    all_ids = np.asarray(ids, dtype=np.int32)
    sizes[np.isin(all_ids, special)] = 0
    return _Encoded(all_ids, ends, sizes)


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        truncation=False,
        padding=False,
        verbose=False,
    )


def _byte_positions(text: str) -> np.ndarray:
    """Byte position of every character of the UTF-8 text, and of its end."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


# Text


@dataclass(frozen=True)
class _Plan:
    """Which documents are held out, or from which character on the one at ``cut[0]`` is."""

    held_out: list[int]
    cut: tuple[int, int] | None = None


def _fill_from_text(
    data: TextData, tokenizer: PreTrainedTokenizerBase, options: _Options, train: _Sink, held_out: _Sink
) -> Counts:
    texts = _Texts(data, tokenizer)
    order = np.random.default_rng(options.seed).permutation(len(texts.sizes)).tolist()
    plan = _hold_out(texts, order, options)
    validation = _Cutter(held_out, _most_held_out(options))
    validation.run(texts.tokens(texts.held_out(plan), located=True))
    T = options.window
    room = math.inf if options.max_tokens is None else options.max_tokens // T - held_out.length
    training = _Cutter(train, room)
    training.run(texts.tokens(texts.training(plan, order)))
    if train.length == 0 or held_out.length == 0:
        raise _too_short(texts, options)
    return Counts(
        train_tokens=train.length * T,
        validation_tokens=held_out.length * (T - 1),
        validation_bytes=validation.predicted_bytes,
        left_over=len(training.ids) + len(validation.ids),
    )


class _Cutter:
    """Cuts a stream of tokens into windows, ``most`` of them at most, and adds up the bytes they predict."""

    def __init__(self, sink: _Sink, most: float) -> None:
        self.sink, self.most = sink, most
        self.ids, self.sizes = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        self.predicted_bytes = 0

    def run(self, stream: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        T = self.sink.window
        for ids, sizes in stream:
            self.ids, self.sizes = np.concatenate([self.ids, ids]), np.concatenate([self.sizes, sizes])
            count = int(min(len(self.ids) // T, self.most - self.sink.length))
            self.sink.add(self.ids[: count * T].reshape(-1, T))
            self.predicted_bytes += int(self.sizes[: count * T].reshape(-1, T)[:, 1:].sum())
            self.ids, self.sizes = self.ids[count * T :], self.sizes[count * T :]
            if self.sink.length >= self.most:
                return


def _most_held_out(options: _Options) -> float:
    """Most validation windows: the number asked for; under ``max_tokens`` twice the share, and not all."""
    if isinstance(options.validation, int):
        return options.validation
    if options.max_tokens is None:
        return math.inf
    windows = options.max_tokens // options.window
    return min(windows - 1, max(1, round(2 * options.validation * windows)))


class _Texts:
    """The documents of a source, their sizes in bytes, and how they become tokens."""

    def __init__(self, data: TextData, tokenizer: PreTrainedTokenizerBase) -> None:
        import pyarrow.compute as pc

        self.name = data.name
        self.documents = data.documents
        self.tokenizer = tokenizer
        self.before, self.after = _lead(tokenizer), [tokenizer.eos_token_id]
        tables = data.documents.with_format("arrow").iter(batch_size=10_000)
        lengths = [pc.binary_length(table["text"]).to_numpy() for table in tables]
        self.sizes = np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, dtype=np.int64)

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Documents with their numbers, in the order given; empty ones are left out."""
        for group in _groups((index for index in indices if self.sizes[index]), lambda index: int(self.sizes[index])):
            yield from zip(group, self.documents[group]["text"], strict=True)

    def held_out(self, plan: _Plan) -> Iterator[str]:
        yield from (text for _, text in self.read(plan.held_out))
        if plan.cut is not None:
            yield from (text[plan.cut[1] :] for _, text in self.read([plan.cut[0]]))

    def training(self, plan: _Plan, order: list[int]) -> Iterator[str]:
        held_out = set(plan.held_out)
        for index, text in self.read(index for index in order if index not in held_out):
            yield text[: plan.cut[1]] if plan.cut is not None and plan.cut[0] == index else text

    def tokens(self, texts: Iterable[str], *, located: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The token stream of some texts, some of it at a time, and the bytes each token stands for.

        BOS and EOS that are put around a text stand for no bytes; unless ``located``, nothing does.
        """
        for group in _groups((piece for text in texts for piece in _pieces(text)), lambda piece: len(piece[0])):
            pieces = [text for text, _, _ in group]
            if located:
                encoded = [(one.ids, one.sizes) for one in _encode_located(self.tokenizer, pieces)]
            else:
                encoded = [(ids, np.zeros(len(ids), dtype=np.int64)) for ids in _encode(self.tokenizer, pieces)]
            ids, sizes = [], []
            for (piece_ids, piece_sizes), (_, first, last) in zip(encoded, group, strict=True):
                before, after = self.before if first else [], self.after if last else []
                ids += [np.asarray(before, dtype=np.int32), piece_ids, np.asarray(after, dtype=np.int32)]
                sizes += [np.zeros(len(before), dtype=np.int64), piece_sizes, np.zeros(len(after), dtype=np.int64)]
            yield np.concatenate(ids), np.concatenate(sizes)

    def count(self, texts: Iterable[str], *, most: float = math.inf) -> int:
        """Number of tokens, counted until there are ``most``."""
        total = 0
        for ids, _ in self.tokens(texts):
            total += len(ids)
            if total >= most:
                break
        return total

    def bytes_per_token(self, order: list[int]) -> float:
        """Measured on the first documents of ``order``."""
        size = tokens = 0
        for ids, sizes in self.tokens((text for _, text in self.read(order)), located=True):
            size, tokens = size + int(sizes.sum()), tokens + len(ids)
            if size >= SAMPLE_BYTES:
                break
        return size / max(tokens, 1)


def _groups(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items, few and small enough to handle at once."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if len(group) == BATCH_DOCUMENTS or total >= BATCH_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[tuple[str, bool, bool]]:
    """A text in pieces cut after line ends, so that memory stays bounded: (piece, is it the first, the last)."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        cut = text.rfind("\n", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        yield text[start:cut], start == 0, False
        start = cut
    yield text[start:], start == 0, True


def _hold_out(texts: _Texts, order: list[int], options: _Options) -> _Plan:
    """Choose what is held out: at least the windows asked for, at least one."""
    total = int(texts.sizes.sum())
    ratio = texts.bytes_per_token(order)
    if isinstance(options.validation, int):
        need = options.validation * options.window
        target = need * ratio
    else:
        need = options.window
        capped = total if options.max_tokens is None else min(total, options.max_tokens * ratio)
        target = max(options.validation * capped, need * ratio)
    while target < total:
        plan = _plan(texts, order, target)
        if texts.count(texts.held_out(plan), most=need) >= need:
            return plan
        target *= 1.3
    raise _too_short(texts, options)


def _plan(texts: _Texts, order: list[int], target: float) -> _Plan:
    """Documents of about ``target`` bytes together; a part of the longest one if that cannot be.

    Documents larger than twice the target stay in training, or one book among notes would be all of it.
    """
    sizes, chosen, held = texts.sizes, [], 0
    for index in order:
        if 0 < sizes[index] <= 2 * target - held:
            chosen.append(index)
            held += int(sizes[index])
            if held >= target:
                return _Plan(chosen)
    larger = [index for index in order if target <= sizes[index] <= sizes.sum() / 2]
    if larger:
        return _Plan([min(larger, key=lambda index: (sizes[index], index))])
    longest = int(sizes.argmax())
    text = next(text for _, text in texts.read([longest]))
    keep = max(0, len(text) - round(target / sizes[longest] * len(text)))
    line = text.rfind("\n", max(0, keep - 200), keep) + 1
    return _Plan([], cut=(longest, line or keep))


def _too_short(texts: _Texts, options: _Options) -> DataError:
    present = texts.count(text for _, text in texts.read(range(len(texts.sizes))))
    held_out = options.validation if isinstance(options.validation, int) else 1
    return DataError(
        f"{texts.name}: too little text: {present:,} tokens, but one training and {held_out} validation "
        f"window{'s' if held_out > 1 else ''} of {options.window} need more than "
        f"{(1 + held_out) * options.window:,}; use a smaller window or more text"
    )


# Conversations


def _fill_from_chat(
    data: TextData, tokenizer: PreTrainedTokenizerBase, options: _Options, train: _Sink, held_out: _Sink
) -> Counts:
    total = len(data.documents)
    share = options.validation
    wanted = share if isinstance(share, int) else max(1, round(share * total))
    chat = _Chat(data, tokenizer, options.window)
    training, validation = (_Packer(sink, options, chat.pad) for sink in (train, held_out))
    for example in chat.examples(np.random.default_rng(options.seed).permutation(total).tolist()):
        used = training.tokens + validation.tokens + len(example.ids)
        if options.max_tokens is not None and used > options.max_tokens:
            break
        (validation if validation.count < wanted else training).add(example)
    training.flush()
    validation.flush()
    if training.count == 0 or validation.count < wanted:
        raise DataError(
            f"{data.name}: {total} examples, {chat.dropped} of them dropped as too long or without a response, "
            f"cannot give {wanted} for validation and one for training; use a larger window or more data"
        )
    return Counts(
        train_tokens=training.tokens,
        validation_tokens=validation.predicted,
        validation_bytes=validation.predicted_bytes,
        truncated=chat.truncated,
        dropped=chat.dropped,
    )


@dataclass(frozen=True)
class _Example:
    ids: np.ndarray
    mask: np.ndarray
    sizes: np.ndarray


class _Packer:
    """Fills windows with examples: one each, or with ``pack`` as many as fit one after the other."""

    def __init__(self, sink: _Sink, options: _Options, pad: int) -> None:
        self.sink, self.window, self.pack, self.pad = sink, options.window, options.pack, pad
        self.count = self.tokens = self.predicted = self.predicted_bytes = 0
        self.open: list[_Example] = []

    def add(self, example: _Example) -> None:
        held = sum(len(other.ids) for other in self.open)
        if self.open and (not self.pack or held + len(example.ids) > self.window):
            self.flush()
        self.open.append(example)
        self.count += 1
        self.tokens += len(example.ids)
        self.predicted += int(example.mask[1:].sum())
        self.predicted_bytes += int(example.sizes[1:][example.mask[1:] == 1].sum())

    def flush(self) -> None:
        if not self.open:
            return
        ids_T, attention_T, loss_T = (np.full(self.window, fill, dtype=np.int32) for fill in (self.pad, 0, 0))
        at = 0
        for example in self.open:
            upto = at + len(example.ids)
            ids_T[at:upto], attention_T[at:upto], loss_T[at:upto] = example.ids, 1, example.mask
            at = upto
        self.sink.add(ids_T[None], attention_T[None], loss_T[None])
        self.open = []


class _Chat:
    """Conversations of a source as token ids with a mask on the responses."""

    def __init__(self, data: TextData, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        self.data, self.tokenizer, self.window = data, tokenizer, window
        self.own = bool(tokenizer.chat_template)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.truncated = self.dropped = 0

    def examples(self, order: list[int]) -> Iterator[_Example]:
        for start in range(0, len(order), BATCH_DOCUMENTS):
            indices = order[start : start + BATCH_DOCUMENTS]
            rows = self.data.documents.with_format("arrow")[indices].to_pylist()
            rendered = [self._render(self._turns(row), index) for row, index in zip(rows, indices, strict=True)]
            encoded = _encode_located(self.tokenizer, [text for text, _ in rendered])
            for (_, spans), one in zip(rendered, encoded, strict=True):
                example = self._cut(one, spans)
                if example is not None:
                    yield example

    def _turns(self, row: dict[str, Any]) -> list[dict[str, str]]:
        if self.data.kind == "messages":
            return row["messages"]
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]

    def _cut(self, encoded: _Encoded, spans: list[tuple[int, int]]) -> _Example | None:
        mask = np.zeros(len(encoded.ids), dtype=np.int64)
        for start, end in spans:
            mask[(encoded.ends > start) & (encoded.ends <= end)] = 1
        T = self.window
        if not mask[1:T].any():
            self.dropped += 1
            return None
        self.truncated += int(len(encoded.ids) > T)
        return _Example(encoded.ids[:T], mask[:T], encoded.sizes[:T])

    def _render(self, turns: list[dict[str, str]], index: int) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from where to where each response goes, end marker included.

        A template may write earlier turns differently once later ones follow (some leave out earlier
        reasoning); a response that is not found again in the whole text counts as context.
        """
        whole = self._apply(turns, index)
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant" or number == 0:
                continue
            before = self._apply(turns[:number], index)
            upto = self._apply(turns[: number + 1], index) if number + 1 < len(turns) else whole
            if whole.startswith(before) and whole.startswith(upto):
                asked = self._apply(turns[:number], index, add_generation_prompt=True)
                start = len(os.path.commonprefix([whole, asked]))  # noqa: RUF071  characters are meant
                spans.append((start, len(upto.rstrip())))
        return whole, spans

    def _apply(self, turns: list[dict[str, str]], index: int, *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=None if self.own else FALLBACK_TEMPLATE,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.data.name} record {index + 1}: the tokenizer's chat template refuses this conversation "
                f"({reason}); change the record, or use another tokenizer"
            ) from error
        begin = "" if self.own or not _lead(self.tokenizer) else str(self.tokenizer.bos_token)
        return begin + str(text)
