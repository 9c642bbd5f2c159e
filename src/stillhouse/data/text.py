"""Documents from whatever the user has: files, folders, hub data sets, or the embedded demo.

``datasets`` and ``pyarrow`` read and hold the data. What is added here is a check of every record, with an
error of one line that names the file and the line, and a form that no longer depends on where it came from:

=====================  ====================================================================
kind                   columns of ``TextData.documents``
=====================  ====================================================================
``text``               ``text``: str
``prompt-completion``  ``prompt``: str, ``completion``: str
``messages``           ``messages``: list of ``{"role": str, "content": str}``
=====================  ====================================================================
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from stillhouse.base.errors import DataError, suggest
from stillhouse.base.files import whole_file, write_json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Kind = Literal["text", "prompt-completion", "messages"]
Policy = Literal["error", "skip"]
Record = dict[str, Any]

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "bard": "assistant"}
IN_MEMORY_BYTES = 64 << 20  # larger files become memory-mapped Arrow
LARGEST_DOCUMENT = 1 << 30
BATCH_ROWS, BATCH_BYTES = 1000, 8 << 20
SKIPPED_SHOWN = 5
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ACCEPTED = (
    "{text}, {prompt, completion}, {messages: [{role, content}]}, {conversations: [{from, value}]} "
    "or {instruction, input, output}"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class _BadRecordError(Exception):
    """A record that cannot be used: an error, or skipped and counted, as the user chose."""


@dataclass(frozen=True)
class TextData:
    """Documents of one kind, and what is known about them.

    Attributes:
        documents: a ``datasets.Dataset`` with the columns of ``kind`` (see the module); memory-mapped if large.
        kind: ``"text"``, ``"prompt-completion"`` or ``"messages"``.
        name: what the user asked for.
        fingerprint: sha256 (hex) of the content, or of the identity of a hub data set.
        skipped: number of records left out because they cannot be used (``on_bad_record="skip"``).
        skipped_examples: where and why, for the first five of them.
        ignored_files: number of files in a folder whose ending is not one that is read.
    """

    documents: datasets.Dataset
    kind: Kind
    name: str
    fingerprint: str
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    ignored_files: int = 0

    def describe(self) -> str:
        """One line for people: name, size, kind, and what was left out."""
        line = f"{self.name}: {len(self.documents):,} documents ({self.kind})"
        if self.skipped:
            line += f"; {self.skipped:,} bad records skipped (first: {self.skipped_examples[0]})"
        if self.ignored_files:
            line += f"; {self.ignored_files:,} files ignored (only {', '.join(SUFFIXES)} are read)"
        return line


def load_text(
    source: str,
    *,
    split: str | None = None,
    text_field: str | None = None,
    on_bad_record: Policy = "error",
    cache_dir: Path | None = None,
) -> TextData:
    """Load documents from a file, a folder, a hub data set or the demo.

    Args:
        source: ``"demo"`` (the documentation inside Python itself); a ``.txt`` file (one document, or several
            separated by form feeds), ``.jsonl``, ``.json`` or ``.parquet`` file; a folder of such files, read
            in sorted order; a folder written by ``Dataset.save_to_disk``; or a hub id ``org/name[:config]``.
        split: split of a hub data set (default ``"train"``, slices such as ``"train[:1%]"`` allowed), or the
            part of a folder whose files or subfolders are named so.
        text_field: field that holds the text; without it the first usable record decides, in this order:
            ``messages``, ``conversations``, ``prompt``/``completion``, ``instruction``/``output``, ``text``.
        on_bad_record: ``"error"`` stops at the first record that cannot be used; ``"skip"`` leaves such records
            out and counts them. Files that cannot be read at all are always errors.
        cache_dir: where large input is kept as Arrow (default: the cache of ``datasets``).

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    if on_bad_record not in ("error", "skip"):
        raise DataError(f"on_bad_record={on_bad_record!r}: must be 'error' or 'skip'")
    reading = _Reading(policy=on_bad_record, text_field=text_field)
    path = Path(source).expanduser()
    if source == "demo":
        return _demo(reading)
    if _is_local(path, source):
        return _load_local(path, source, split=split, reading=reading, cache_dir=cache_dir)
    if HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        return _load_hub(source, split=split or "train", reading=reading, cache_dir=cache_dir)
    raise _missing(path, source)


# Where the source is


def _is_local(path: Path, source: str) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise _data_error(f"{source[:80]}: not a usable path ({_reason(error)}); check the name") from error


def _missing(path: Path, source: str) -> DataError:
    if path.is_symlink():
        return _data_error(f"{source}: a link to a file that does not exist; put the link right")
    parent = path.parent
    if not parent.is_dir():
        return _data_error(f"{source}: no such file or folder ({parent} does not exist); check the path")
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    near = suggest(path.name, [*names, *(["demo"] if str(parent) == "." else [])])
    return _data_error(f"{source}: no such file or folder{near or '; check the path'}")


def _near(path: Path) -> str:
    """Names beside ``path`` that are nearly its own, as the end of a message; empty if there are none."""
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside)
    return suggest(path.name, close) if close else ""


def _load_local(path: Path, source: str, *, split: str | None, reading: _Reading, cache_dir: Path | None) -> TextData:
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _load_saved_dataset(path, source, split=split, reading=reading, cache_dir=cache_dir)
    if path.is_file() and split is not None:
        raise _data_error(f"{source}: split={split!r} chooses within a folder or a hub data set; leave it out")
    files, ignored = _files(path, source, split=split) if path.is_dir() else ([_known_kind(path)], 0)
    records = itertools.chain.from_iterable(_file_records(file, text_field=reading.text_field) for file in files)
    fingerprint = _fingerprint_of_files(files, text_field=reading.text_field)
    size = sum(file.stat().st_size for file in files)
    documents = reading.dataset(
        records,
        source=source,
        cache=None if size <= IN_MEMORY_BYTES else _cache_file(cache_dir, fingerprint, files),
    )
    return reading.result(documents, name=source, fingerprint=fingerprint, ignored_files=ignored)


def _known_kind(path: Path) -> Path:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        packed = suffix in (".gz", ".bz2", ".xz", ".zst", ".zip")
        advice = "unpack it first" if packed else "convert it, .jsonl suits most data"
        raise _data_error(f"{path}: unsupported ending {suffix!r} (known: {', '.join(SUFFIXES)}); {advice}")
    return path


def _files(folder: Path, source: str, *, split: str | None) -> tuple[list[Path], int]:
    """The files of a folder that are read, in sorted order, and the number of those that are not."""

    def refuse(error: OSError) -> None:
        raise _os_error(Path(error.filename or folder), error) from error

    found: list[Path] = []
    others: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                (found if Path(name).suffix.lower() in SUFFIXES else others).append(Path(root, name))
    found.sort(key=lambda file: file.relative_to(folder).parts)
    if not found:
        seen = ", ".join(sorted({file.suffix or file.name for file in others})[:5])
        held = f"it holds only {seen}" if others else "it is empty"
        raise _data_error(f"{source}: no data in this folder ({held}); put {', '.join(SUFFIXES)} files into it")
    if split is not None:
        found = [file for file in found if _in_split(file.relative_to(folder), split)]
        if not found:
            raise _data_error(f"{source}: no file or subfolder is named after split={split!r}; leave split out")
    return found, len(others)


def _in_split(file: Path, split: str) -> bool:
    return split in file.parts[:-1] or re.match(re.escape(split) + r"(?![^\W_])", file.name) is not None


def _fingerprint_of_files(files: Iterable[Path], *, text_field: str | None) -> str:
    total = hashlib.sha256(f"stillhouse-text-1 {text_field!r}".encode())
    for path in files:
        digest = hashlib.sha256()
        with _open(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        total.update(f"{path.suffix.lower()} {digest.hexdigest()}\n".encode())
    return total.hexdigest()


# Reading: each reader yields (where, record), a record that cannot be used as a _BadRecordError


def _file_records(path: Path, *, text_field: str | None) -> Iterator[tuple[str, Record | _BadRecordError]]:
    suffix = path.suffix.lower()
    with _open(path) as file:
        head = file.read(8192)
    if not head.strip() and path.stat().st_size == len(head):
        raise _data_error(f"{path}: the file is empty; give a file with documents in it")
    if suffix == ".parquet":
        return _read_parquet(path, text_field=text_field)
    _check_is_text(path, head)
    if suffix == ".txt":
        return _read_txt(path, text_field=text_field or "text")
    if suffix == ".json" and not head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return _read_json(path)
    return _read_jsonl(path)  # also a .json file of one object a line, as many hub data sets have them


def _check_is_text(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _data_error(f"{path}: UTF-16, must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    if b"\0" in head:
        raise _data_error(f"{path}: a binary file (it has NUL bytes), must be UTF-8 text; check what the file is")


def _decode(raw: bytes, *, start: int) -> str:
    """UTF-8 bytes that begin at byte ``start`` of their file, as text."""
    if start == 0 and raw.startswith(BYTE_ORDER_MARK):
        start, raw = len(BYTE_ORDER_MARK), raw.removeprefix(BYTE_ORDER_MARK)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecordError(
            f"not UTF-8 at byte {start + error.start} (0x{raw[error.start]:02x}); convert the file, if it is "
            "Windows-1252 with: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from error


def _read_txt(path: Path, *, text_field: str) -> Iterator[tuple[str, Record | _BadRecordError]]:
    for number, (start, raw) in enumerate(_form_feed_parts(path), 1):
        where = str(path) if number == 1 else f"{path} document {number}"
        try:
            if b"\0" in raw:
                raise _BadRecordError(
                    f"a NUL byte at byte {start + raw.index(0)}, must be UTF-8 text; check what the file is"
                )
            text = _decode(raw, start=start)
        except _BadRecordError as bad:
            yield where, bad
        else:
            if text.strip():
                yield where, {text_field: text}


def _form_feed_parts(path: Path) -> Iterator[tuple[int, bytes]]:
    """The parts of a file between form feeds with their byte offsets, without holding the file in memory."""
    start, parts, size = 0, [], 0
    with _open(path) as file:
        while block := file.read(1 << 20):
            first, *rest = block.split(b"\f")
            parts.append(first)
            size += len(first)
            for piece in rest:
                yield start, b"".join(parts)
                start, parts, size = start + size + 1, [piece], len(piece)
            if size > LARGEST_DOCUMENT:
                raise _data_error(
                    f"{path}: one document of more than {LARGEST_DOCUMENT >> 20} MiB; put form feeds between "
                    "documents, or convert it to .jsonl with one document a line"
                )
    yield start, b"".join(parts)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record | _BadRecordError]]:
    start = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    yield f"{path}:{number}", _parse_line(_decode(raw.rstrip(b"\r\n"), start=start))
                except _BadRecordError as bad:
                    yield f"{path}:{number}", bad
            start += len(raw)


def _parse_line(line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRecordError(f"not JSON ({error.msg} at column {error.colno}); one object a line") from error
    except (ValueError, RecursionError) as error:
        raise _BadRecordError(f"not usable JSON ({_reason(error)})") from error
    return _as_object(record)


def _as_object(record: object) -> Record:
    if not isinstance(record, dict):
        raise _BadRecordError(f'{_json_type(record)}, must be an object such as {{"text": ...}}')
    return record


def _read_json(path: Path) -> Iterator[tuple[str, Record | _BadRecordError]]:
    with _open(path) as file:
        raw = file.read()
    try:
        records = json.loads(_decode(raw, start=0))
    except json.JSONDecodeError as error:
        raise _data_error(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except (_BadRecordError, ValueError, RecursionError) as error:
        raise _data_error(f"{path}: {_reason(error)}") from error
    if not isinstance(records, list):
        raise _data_error(f"{path}: {_json_type(records)}, must be a list of objects; or write one a line as .jsonl")
    for number, record in enumerate(records, 1):
        try:
            yield f"{path} record {number}", _as_object(record)
        except _BadRecordError as bad:
            yield f"{path} record {number}", bad


def _read_parquet(path: Path, *, text_field: str | None) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def corrupt(error: Exception) -> DataError:
        return _data_error(f"{path}: not a readable Parquet file ({_reason(error)}); write or download it again")

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise corrupt(error) from error
    with parquet:
        columns = _columns(list(parquet.schema_arrow.names), text_field=text_field, where=str(path))
        number = 0
        try:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise corrupt(error) from error


def _columns(names: list[str], *, text_field: str | None, where: str) -> list[str]:
    """The columns worth reading; an error if none holds documents."""
    held = "columns: " + ", ".join(names[:20])
    if text_field is not None:
        if text_field not in names:
            raise _data_error(f"{where}: no column {text_field!r}{suggest(text_field, names)} ({held})")
        return [text_field]
    if _form_of(names) is None:
        raise _data_error(f"{where}: no text column ({held}); name one with text_field=COLUMN")
    return [name for name in names if name in ("input", *itertools.chain(*(form.fields for form in FORMS)))]


# Forms of records


@dataclass(frozen=True)
class _Form:
    """A way to write a record: the fields that mark it, and how it becomes a document."""

    fields: tuple[str, ...]
    kind: Kind
    convert: Callable[[Record], Record]


def _string(record: Record, name: str) -> str:
    if name not in record:
        raise _BadRecordError(f"no field {name!r} (it has {_names(record)}); add it")
    return _checked_string(record[name], f"field {name!r}")


def _checked_string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _BadRecordError(f"{what} is {_json_type(value)}, must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRecordError(f"{what} has half a surrogate pair at character {error.start}") from error
    return value


def _convert_text(record: Record, *, name: str) -> Record:
    return {"text": _string(record, name)}


def _convert_prompt(record: Record) -> Record:
    return {"prompt": _string(record, "prompt"), "completion": _string(record, "completion")}


def _convert_instruction(record: Record) -> Record:
    more = _string(record, "input") if record.get("input") is not None else ""
    prompt = _string(record, "instruction") + (f"\n\n{more}" if more else "")
    return {"prompt": prompt, "completion": _string(record, "output")}


def _convert_messages(record: Record, *, name: str) -> Record:
    if name not in record:
        raise _BadRecordError(f"no field {name!r} (it has {_names(record)}); add it")
    turns = record[name]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if isinstance(turns, list) else _json_type(turns)
        raise _BadRecordError(f"field {name!r} is {found}, must be a list of messages")
    return {"messages": [_message(turn, f"{name}[{number}]") for number, turn in enumerate(turns)]}


def _message(turn: object, what: str) -> dict[str, str]:
    if isinstance(turn, dict):
        for role_key, content_key in (("role", "content"), ("from", "value")):
            if turn.get(role_key) is not None and content_key in turn:
                role = _checked_string(turn[role_key], f"{what}.{role_key}")
                content = _checked_string(turn[content_key], f"{what}.{content_key}")
                return {"role": ROLES.get(role, role), "content": content}
    raise _BadRecordError(f"{what} must be an object with role and content")


FORMS = (
    _Form(("messages",), "messages", functools.partial(_convert_messages, name="messages")),
    _Form(("conversations",), "messages", functools.partial(_convert_messages, name="conversations")),
    _Form(("prompt", "completion"), "prompt-completion", _convert_prompt),
    _Form(("instruction", "output"), "prompt-completion", _convert_instruction),
    _Form(("text",), "text", functools.partial(_convert_text, name="text")),
)


def _form_of(names: Iterable[str]) -> _Form | None:
    held = set(names)
    return next((form for form in FORMS if held.issuperset(form.fields)), None)


class _Reading:
    """Turns records into documents of one kind, and keeps count of those that cannot be used."""

    def __init__(self, *, policy: Policy, text_field: str | None) -> None:
        self.policy = policy
        self.text_field = text_field
        self.form: _Form | None = None
        if text_field is not None:
            self.form = _Form((text_field,), "text", functools.partial(_convert_text, name=text_field))
        self.skipped = 0
        self.examples: list[str] = []

    def documents(self, records: Iterable[tuple[str, Record | _BadRecordError]]) -> Iterator[Record]:
        for where, record in records:
            try:
                if isinstance(record, _BadRecordError):
                    raise record
                yield self._convert(record)
            except _BadRecordError as bad:
                if self.policy == "error":
                    hint = "put it right, or leave such records out with on_bad_record=skip"
                    raise _data_error(f"{where}: {bad}; {hint}") from bad
                self.skipped += 1
                if len(self.examples) < SKIPPED_SHOWN:
                    self.examples.append(_one_line(f"{where}: {bad}"))

    def _convert(self, record: Record) -> Record:
        if self.form is None:
            self.form = _form_of(record)
            if self.form is None:
                raise _BadRecordError(f"no text in a record with {_names(record)}; use {ACCEPTED}, or set text_field")
        return self.form.convert(record)

    def dataset(
        self,
        records: Iterable[tuple[str, Record | _BadRecordError]],
        *,
        source: str,
        cache: Path | None,
    ) -> datasets.Dataset:
        """The documents as a data set: in memory, or memory-mapped from ``cache``, which is made if missing."""
        import datasets
        import pyarrow as pa

        if cache is not None and self._recall(cache):
            return datasets.Dataset.from_file(str(cache))
        documents = self.documents(records)
        first = next(documents, None)
        if first is None:
            raise self._nothing(source)
        assert self.form is not None
        schema = _schema(self.form.kind)
        batches = _batches(itertools.chain([first], documents), schema=schema)
        if cache is None:
            return datasets.Dataset(pa.Table.from_batches(batches, schema=schema))
        self._store(cache, batches, schema)
        return datasets.Dataset.from_file(str(cache))

    def _nothing(self, source: str) -> DataError:
        if self.skipped:
            return _data_error(f"{source}: none of {self.skipped} records can be used; first: {self.examples[0]}")
        return _data_error(f"{source}: no documents in it; give data with at least one")

    def _store(self, cache: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
        import pyarrow as pa

        with whole_file(cache) as part, part.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        assert self.form is not None
        known = {"fields": self.form.fields, "skipped": self.skipped, "examples": self.examples}
        write_json(cache.with_suffix(".json"), known)  # last: an Arrow file without it does not count

    def _recall(self, cache: Path) -> bool:
        """Take over the counts of a finished cache file; False if there is none that fits."""
        try:
            known = json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not cache.is_file() or (known["skipped"] and self.policy == "error"):
            return False  # reading again finds the bad record and names it
        self.skipped, self.examples = known["skipped"], known["examples"]
        self.form = self.form or _form_of(known["fields"])
        return self.form is not None

    def result(self, documents: datasets.Dataset, *, name: str, fingerprint: str, ignored_files: int = 0) -> TextData:
        assert self.form is not None
        return TextData(
            documents=documents,
            kind=self.form.kind,
            name=name,
            fingerprint=fingerprint,
            skipped=self.skipped,
            skipped_examples=self.examples,
            ignored_files=ignored_files,
        )


def _schema(kind: Kind) -> pa.Schema:
    import pyarrow as pa

    string = pa.large_string()  # 64-bit offsets: one batch may hold more than 2 GiB
    if kind == "text":
        return pa.schema({"text": string})
    if kind == "prompt-completion":
        return pa.schema({"prompt": string, "completion": string})
    return pa.schema({"messages": pa.list_(pa.struct({"role": string, "content": string}))})


def _batches(documents: Iterable[Record], *, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rows: list[Record] = []
    size = 0
    for document in documents:
        rows.append(document)
        size += sum(len(value) if isinstance(value, str) else len(str(value)) for value in document.values())
        if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=schema)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _cache_file(cache_dir: Path | None, fingerprint: str, files: Iterable[object]) -> Path:
    """Where large input is kept. The names are part of the key because notes on skipped records quote them."""
    import datasets

    root = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "stillhouse"
    names = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()
    return root / f"text-{fingerprint[:32]}-{names[:8]}.arrow"


# Sources that are not plain files


def _demo(reading: _Reading) -> TextData:
    from pydoc_data.topics import topics

    reading.text_field, reading.form = None, FORMS[-1]
    records = [(f"demo topic {name!r}", {"text": topics[name]}) for name in sorted(topics)]
    documents = reading.dataset(records, source="demo", cache=None)
    digest = hashlib.sha256(b"stillhouse-text-1 demo")
    for _, record in records:
        digest.update(hashlib.sha256(record["text"].encode()).digest())
    return reading.result(documents, name="demo", fingerprint=digest.hexdigest())


def _load_saved_dataset(
    path: Path, source: str, *, split: str | None, reading: _Reading, cache_dir: Path | None
) -> TextData:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise _data_error(f"{source}: cannot be read as a saved data set ({_reason(error)}); save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in loaded:
            raise _data_error(f"{source}: no split {wanted!r}{suggest(wanted, loaded)}")
        loaded, path = loaded[wanted], path / wanted
    elif split is not None:
        raise _data_error(f"{source}: holds one data set, no splits; leave split={split!r} out")
    files = sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    fingerprint = _fingerprint_of_files(files, text_field=reading.text_field)
    return _from_dataset(loaded, name=source, fingerprint=fingerprint, reading=reading, cache_dir=cache_dir)


def _load_hub(source: str, *, split: str, reading: _Reading, cache_dir: Path | None) -> TextData:
    import datasets

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _data_error(
            f"{source}: no such file, folder or hub data set (or it is private: hf auth login); check the name"
            + _near(Path(source))
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise _data_error(
            f"{source}: no such file or folder, and the hub cannot be reached ({_reason(error)}); "
            f"pass a local path, or go online{_near(Path(source))}"
        ) from error
    except Exception as error:
        raise _data_error(f"{source}: this hub data set cannot be loaded ({_reason(error)})") from error
    identity = f"stillhouse-text-1 hub {source} {split} {reading.text_field!r} {loaded._fingerprint}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return _from_dataset(loaded, name=source, fingerprint=fingerprint, reading=reading, cache_dir=cache_dir)


def _from_dataset(
    loaded: datasets.Dataset, *, name: str, fingerprint: str, reading: _Reading, cache_dir: Path | None
) -> TextData:
    columns = _columns(loaded.column_names, text_field=reading.text_field, where=name)
    form = reading.form or _form_of(columns)
    assert form is not None
    reading.form = form
    if form.kind == "text" and _is_clean(loaded, form.fields[0]):
        documents = loaded.select_columns([form.fields[0]])
        if form.fields[0] != "text":
            documents = documents.rename_column(form.fields[0], "text")
        return reading.result(documents, name=name, fingerprint=fingerprint)
    tables = loaded.select_columns(columns).with_format("arrow").iter(batch_size=BATCH_ROWS)
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    records = ((f"{name} row {number}", row) for number, row in enumerate(rows, 1))
    large = loaded.data.nbytes > IN_MEMORY_BYTES
    cache = _cache_file(cache_dir, fingerprint, [name]) if large else None
    return reading.result(reading.dataset(records, source=name, cache=cache), name=name, fingerprint=fingerprint)


def _is_clean(loaded: datasets.Dataset, column: str) -> bool:
    """True if the column holds strings only, so that it can be used where it lies."""
    dtype = getattr(loaded.features[column], "dtype", None)
    return len(loaded) > 0 and dtype in ("string", "large_string") and loaded.data.column(column).null_count == 0


# Errors


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _os_error(path, error) from error


def _os_error(path: Path, error: OSError) -> DataError:
    if isinstance(error, PermissionError):
        return _data_error(f"{path}: no permission; allow it, for example with: chmod u+rX {path}")
    if isinstance(error, FileNotFoundError):
        return _missing(path, str(path))
    return _data_error(f"{path}: {error.strerror or error}; check the disk and the path")


def _data_error(message: str) -> DataError:
    return DataError(_one_line(message))


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _reason(error: Exception) -> str:
    """What an exception says, short and on one line."""
    return _one_line(str(error) or type(error).__name__)[:200].rstrip(".")


def _names(record: Record) -> str:
    return ("the fields " + ", ".join(map(repr, list(record)[:8]))) if record else "no fields"


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
