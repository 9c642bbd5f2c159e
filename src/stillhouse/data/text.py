"""Documents from whatever the user has: files, folders, hub data sets, or the embedded demo.

``datasets`` holds and caches them, ``pydantic`` checks them. What is added here is an error of one line that names the
file and the line, and a form that no longer depends on where the data came from:

=====================  ====================================================================
kind                   columns of ``TextData.documents``
=====================  ====================================================================
``text``               ``text``: str
``prompt-completion``  ``prompt``: str, ``completion``: str
``messages``           ``messages``: list of ``{"role": str, "content": str}``
=====================  ====================================================================
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic_core import from_json

from stillhouse.base.errors import DataError, near, one_line, suggest
from stillhouse.data.records import Kind, features, find_form, form_of, problem, text_form, to_document

if TYPE_CHECKING:
    import datasets

Policy = Literal["error", "skip"]
Records = Iterator[tuple[str, Callable[[], Any]]]
"""Where each record is, and a function that reads it; that raises ValueError if the record cannot be used."""

FORMAT = "text 2"  # part of every fingerprint; change it when the same input gives other documents
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class TextData:
    """Documents of one kind, and what is known about them.

    Attributes:
        documents: a ``datasets.Dataset`` with the columns of ``kind`` (see the module).
        kind: ``"text"``, ``"prompt-completion"`` or ``"messages"``.
        name: what the user asked for.
        fingerprint: sha256 (hex) of the content, or of the identity of a hub data set.
        skipped: number of records left out because they cannot be used (``on_bad_record="skip"``).
        skipped_examples: where and why, for the first five of them.
    """

    documents: datasets.Dataset
    kind: Kind
    name: str
    fingerprint: str
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for people: name, size, kind, and what was left out."""
        line = f"{self.name}: {len(self.documents):,} documents ({self.kind})"
        if self.skipped:
            line += f"; {self.skipped:,} bad records skipped (first: {self.skipped_examples[0]})"
        return line


def load_text(
    source: str, *, split: str | None = None, text_field: str | None = None, on_bad_record: Policy = "error"
) -> TextData:
    """Load documents from a file, a folder, a hub data set or the demo.

    Args:
        source: ``"demo"`` (the documentation inside Python itself); a ``.txt`` file (one document, or several
            separated by form feeds), ``.jsonl``, ``.json`` or ``.parquet`` file; a folder of such files, read in
            sorted order; or a hub id ``org/name[:config]``.
        split: split of a hub data set (default ``"train"``, slices such as ``"train[:1%]"`` allowed).
        text_field: field that holds the text; without it the first usable record decides, in this order:
            ``messages``, ``conversations``, ``prompt``/``completion``, ``instruction``/``output``, ``text``.
        on_bad_record: ``"error"`` stops at the first record that cannot be used; ``"skip"`` leaves such records out
            and counts them. Files that cannot be read at all are always errors.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    if on_bad_record not in ("error", "skip"):
        raise DataError(f"on_bad_record={on_bad_record!r}: must be 'error' or 'skip'")
    path = Path(source).expanduser()
    files: list[Path] = []
    if source == "demo":
        return _demo()
    if _exists(path, source):
        if split is not None:
            raise _data_error(f"{source}: split={split!r} chooses within a hub data set; leave it out")
        files = _files(path)
        parts = [f"{file.suffix.lower()} {_file_digest(file)}" for file in files]
        records = partial(_records_of_files, files, text_field)
    elif HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        rows = _load_hub(source, split or "train")
        parts = [source, str(split), rows._fingerprint]
        records = partial(_records_of_rows, rows, text_field, source)
    else:
        raise _missing(path, source)
    fingerprint = _digest(FORMAT, str(text_field), *parts)
    cache = _digest(fingerprint, on_bad_record, source, *map(str, files))  # notes on bad records name files
    return _collect(records, text_field, on_bad_record, name=source, fingerprint=fingerprint, cache=cache)


def _demo() -> TextData:
    from pydoc_data.topics import topics

    import datasets

    texts = [topics[name] for name in sorted(topics)]
    return TextData(datasets.Dataset.from_dict({"text": texts}), "text", "demo", _digest("demo", *texts))


def _collect(
    records: Callable[[], Records], text_field: str | None, policy: Policy, *, name: str, fingerprint: str, cache: str
) -> TextData:
    """The documents among some records; ``datasets`` keeps them under the name ``cache`` and finds them next time."""
    import datasets

    first = islice(records(), None if policy == "skip" else 1)
    form = text_form(text_field) if text_field else find_form(read for _, read in first)
    columns = {**features(form), "bad": datasets.Value("string")}

    def rows() -> Iterator[dict[str, Any]]:
        empty = True
        for where, read in records():
            empty = False
            try:
                yield {**to_document(read(), form), "bad": None}
            except ValueError as error:
                bad = _one_line(f"{where}: {problem(error)}")
                if policy == "error":
                    hint = "put it right, or leave such records out with on_bad_record=skip"
                    raise DataError(f"{bad}; {hint}") from error
                yield {**dict.fromkeys(columns), "bad": bad}
        if empty:
            raise _data_error(f"{name}: no documents in it; give data with at least one")

    try:
        found = datasets.Dataset.from_generator(rows, features=datasets.Features(columns), fingerprint=cache)
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        place = datasets.config.HF_DATASETS_CACHE
        raise _data_error(f"{name}: cannot be kept in {place} ({one_line(error.__cause__ or error)})") from error
    usable = found.data.column("bad").is_null().to_numpy()
    skipped = len(found) - int(usable.sum())
    examples = list(islice(filter(None, found["bad"]), 5)) if skipped else []
    if skipped == len(found):
        raise _data_error(f"{name}: none of {skipped} records can be used; first: {examples[0]}")
    documents = (found.select(np.flatnonzero(usable)) if skipped else found).remove_columns("bad")
    return TextData(documents, form.kind if form else "text", name, fingerprint, skipped, examples)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Where the source is


def _exists(path: Path, source: str) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise _data_error(f"{source[:80]}: not a usable path ({one_line(error)}); check the name") from error


def _missing(path: Path, source: str) -> DataError:
    if path.is_symlink():
        return _data_error(f"{source}: a link to a file that does not exist; put the link right")
    if not path.parent.is_dir():
        return _data_error(f"{source}: no such file or folder ({path.parent} does not exist); check the path")
    return _data_error(f"{source}: no such file or folder{near(path) or '; check the path'}")


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that are read, in sorted order."""
    known = ", ".join(SUFFIXES)
    if not path.is_dir():
        suffix = path.suffix.lower()
        packed = suffix in (".gz", ".bz2", ".xz", ".zst", ".zip")
        advice = "unpack it first" if packed else "convert it, .jsonl suits most data"
        if suffix not in SUFFIXES:
            raise _data_error(f"{path}: unsupported ending {suffix!r} (known: {known}); {advice}")
        return [path]

    def refuse(error: OSError) -> None:
        raise _os_error(Path(error.filename), error) from error

    walked = os.walk(path, onerror=refuse)
    everything = [Path(root, name).relative_to(path) for root, _, names in walked for name in names]
    visible = [file for file in everything if not any(part.startswith(".") for part in file.parts)]
    found = sorted(path / file for file in visible if file.suffix.lower() in SUFFIXES)
    if not found:
        seen = ", ".join(sorted({file.suffix or file.name for file in visible})[:5])
        held = f"it holds only {seen}" if seen else "it is empty"
        raise _data_error(f"{path}: no data in this folder ({held}); put {known} files into it")
    return found


def _load_hub(source: str, split: str) -> datasets.Dataset:
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        problem = "no such file, folder or hub data set (or it is private: hf auth login); check the name"
        raise _data_error(f"{source}: {problem}{near(Path(source))}") from error
    except (ConnectionError, TimeoutError) as error:
        problem = "no such file or folder, and the hub cannot be reached; pass a local path, or go online"
        raise _data_error(f"{source}: {problem}{near(Path(source))}") from error
    except Exception as error:
        raise _data_error(f"{source}: this hub data set cannot be loaded ({one_line(error)})") from error


# Reading


def _records_of_files(files: list[Path], text_field: str | None) -> Records:
    for path in files:
        with _open(path) as file:
            head = file.read(8192)
        if not head.strip() and path.stat().st_size == len(head):
            raise _data_error(f"{path}: the file is empty; give a file with documents in it")
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from _read_parquet(path, text_field)
        elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise _data_error(f"{path}: UTF-16, must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
        elif b"\0" in head:
            raise _data_error(f"{path}: a binary file (it has NUL bytes), must be UTF-8 text; check what the file is")
        elif suffix == ".txt":
            yield from _read_txt(path, text_field or "text")
        elif suffix == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_json(path)
        else:  # .json may also have one object a line, as in many hub data sets
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", partial(_parse_json, line)


def _read_txt(path: Path, text_field: str) -> Records:
    with _open(path) as file:
        documents = file.read().split(b"\f")
    for number, raw in enumerate(documents, 1):
        if raw.strip():
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            yield f"{path} document {number}", partial(_parse_txt, raw, text_field, encoding)


def _parse_txt(raw: bytes, text_field: str, encoding: str) -> dict[str, str]:
    if b"\0" in raw:
        raise ValueError(f"a NUL byte at byte {raw.index(0)}, must be UTF-8 text; check what the file is")
    return {text_field: raw.decode(encoding)}


def _parse_json(raw: bytes) -> Any:
    text = raw.decode("utf-8-sig").rstrip()
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def _read_json(path: Path) -> Records:
    with _open(path) as file:
        raw = file.read()
    try:
        records = _parse_json(raw)
    except ValueError as error:
        raise _data_error(f"{path}: {problem(error)}") from error
    for number, record in enumerate(records, 1):
        yield f"{path} record {number}", partial(_same, record)


def _read_parquet(path: Path, text_field: str | None) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            columns = _columns(parquet.schema_arrow.names, text_field, str(path))
            batches = parquet.iter_batches(batch_size=1000, columns=columns)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{path} row {number}", partial(_same, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable Parquet file ({one_line(error)}); write or download it again"
        raise _data_error(f"{path}: {problem}") from error


def _records_of_rows(rows: datasets.Dataset, text_field: str | None, name: str) -> Records:
    for number, row in enumerate(rows.select_columns(_columns(rows.column_names, text_field, name)), 1):
        yield f"{name} row {number}", partial(_same, row)


def _same(record: Any) -> Any:
    return record


def _columns(names: list[str], text_field: str | None, where: str) -> list[str]:
    """The columns worth reading; an error if none holds documents."""
    held = "columns: " + ", ".join(names[:20])
    if text_field is not None:
        if text_field not in names:
            raise _data_error(f"{where}: no column {text_field!r}{suggest(text_field, names)} ({held})")
        return [text_field]
    form = form_of(names)
    if form is None:
        raise _data_error(f"{where}: no text column ({held}); name one with text_field=COLUMN")
    return [name for name in names if name in (*form.marks, "input")]


# Errors


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _os_error(path, error) from error


def _os_error(path: Path, error: OSError) -> DataError:
    if isinstance(error, PermissionError):
        return _data_error(f"{path}: no permission; allow it, for example with: chmod u+rX {path}")
    return _data_error(f"{path}: {error.strerror or error}; check the disk and the path")


def _data_error(message: str) -> DataError:
    return DataError(_one_line(message))


def _one_line(message: str) -> str:
    return " ".join(message.split())
