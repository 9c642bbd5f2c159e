"""Labelled text: one or two texts and a class or a number, from files, folders or hub data sets.

``datasets`` reads and caches; columns are found by their names, which GLUE and most hub data sets agree on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.base.errors import DataError, near, one_line, suggest

Kind = Literal["auto", "classes", "numbers"]
"""What labels are: names or numbers of classes, or numbers to predict; ``auto``: fractions are numbers to predict."""

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("first", "second"),
)
SINGLES = ("sentence", "text", "content", "review", "first")
LABELS = ("label", "labels", "target", "class", "score")
HELD_OUT = ("validation", "validation_matched", "dev", "valid", "val", "test")
"""Splits to measure on, in this order: the labels of many a test split are kept secret."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with labels.

    Attributes:
        first, second: the texts; ``second`` is None where each example is one text.
        labels: (N,) int64 numbers of classes, or float32 numbers to predict.
        classes: the names of the classes; None where numbers are predicted.
    """

    first: list[str]
    second: list[str] | None
    labels: Tensor
    classes: tuple[str, ...] | None
    name: str

    def __len__(self) -> int:
        return len(self.first)

    def select(self, positions: Sequence[int]) -> Labelled:
        """The examples at these positions."""
        first = [self.first[position] for position in positions]
        second = None if self.second is None else [self.second[position] for position in positions]
        return replace(self, first=first, second=second, labels=self.labels[list(positions)])

    def held_out(self, share: float) -> tuple[Labelled, Labelled]:
        """The rest, and a share held out; which does not depend on any seed of a run.

        Raises:
            DataError: too few examples for both.
        """
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise DataError(f"{self.name}: {len(self)} examples are too few to hold {share:.0%} out; give more")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0)).tolist()
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def few(self, count: int, *, seed: int) -> Labelled:
        """So many examples, drawn by ``seed``."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.select(sorted(order[: min(count, len(self))]))


def load_labelled(
    source: str,
    *,
    split: str = "train",
    validation_split: str | None = None,
    first_field: str | None = None,
    second_field: str | None = None,
    label_field: str | None = None,
    labels: Kind = "auto",
) -> tuple[Labelled, Labelled | None]:
    """Read a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, a folder of them, or a hub data set.

    Args:
        source: a file (one split, ``train``), a folder with a file for each split (``train.jsonl``, ``dev.jsonl``), or
            a hub id ``org/name[:config]``, such as ``nyu-mll/glue:rte``.
        split: what to train on.
        validation_split: what to measure on; by default the first of `HELD_OUT` that has labels, None if there is none.
        first_field, second_field, label_field: columns; by default found by their names. ``second_field="none"``: none.
        labels: see `Kind`.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    found = _load(source)
    if split not in found:
        raise DataError(f"{source}: no split {split!r}{suggest(split, found)}")
    if validation_split is not None and validation_split not in found:
        raise DataError(f"{source}: no split {validation_split!r}{suggest(validation_split, found)}")
    columns = _columns(found[split].column_names, source, first_field, second_field, label_field)
    train = _read(found[split], columns, source, labels, None)
    names = [validation_split] if validation_split else [name for name in HELD_OUT if name in found and name != split]
    for name in names:
        if validation_split is None and _secret(found[name], columns[-1]):
            continue
        return train, _read(found[name], columns, f"{source} ({name})", labels, train)
    return train, None


def _load(source: str) -> dict[str, Any]:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in READERS)
            if not files:
                raise DataError(
                    f"{source}: no data in this folder; put {', '.join(READERS)} files into it, one a split"
                )
            return {file.stem: _read_file(file) for file in files}
        if path.is_file():
            if path.suffix.lower() not in READERS:
                raise DataError(f"{source}: unknown ending {path.suffix!r}; known: {', '.join(READERS)}")
            return {"train": _read_file(path)}
        if path.suffix.lower() in READERS or path.is_absolute() or source.startswith((".", "~")):
            raise DataError(f"{source}: no such file or folder{near(path) or '; check the path'}")
        name, _, config = source.partition(":")
        return dict(datasets.load_dataset(name, config or None))
    except DataError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{source}: no such file, folder or hub data set{near(path) or '; check the name'}") from error
    except (ConnectionError, TimeoutError) as error:
        raise DataError(
            f"{source}: no such file or folder, and the hub cannot be reached; give a local path, or go online"
        ) from error
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"{source}: cannot be read as labelled text ({one_line(cause)}); check its format") from error


def _read_file(path: Path) -> Any:
    import datasets

    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; give a file with examples in it")
    options = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    return datasets.load_dataset(READERS[path.suffix.lower()], data_files=str(path), split="train", **options)


def _columns(
    names: list[str], source: str, first: str | None, second: str | None, label: str | None
) -> tuple[str, str | None, str]:
    """The columns of the first text, the second (None if there is none), and the label."""
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if first is None:
        single = next((name for name in SINGLES if name in names), None)
        first = pair[0] if pair else single
        if second is None and pair:
            second = pair[1]
    second = None if second is not None and second.lower() == "none" else second
    label = label or next((name for name in LABELS if name in names), None)
    for wanted, field in ((first, "first_field"), (label, "label_field")):
        if wanted is None:
            raise DataError(f"{source}: columns {', '.join(names[:12])}; say which with {field}=COLUMN")
    for wanted, field in ((first, "first_field"), (second, "second_field"), (label, "label_field")):
        if wanted is not None and wanted not in names:
            raise DataError(f"{source}: no column {wanted!r}{suggest(wanted, names)}; set {field}=COLUMN")
    assert first is not None and label is not None
    return first, second, label


def _secret(rows: Any, label: str) -> bool:
    """Whether a split has no labels: the column is missing, or all its values are -1 or None."""
    return label not in rows.column_names or set(rows.unique(label)) <= {-1, None}


def _read(
    rows: Any, columns: tuple[str, str | None, str], source: str, wanted: Kind, like: Labelled | None
) -> Labelled:
    import datasets

    first, second, label = columns
    values = list(rows[label])
    texts = [list(rows[name]) for name in (first, second) if name is not None]
    if not values:
        raise DataError(f"{source}: no examples in it; give at least one")
    for column, name in zip([*texts, values], [name for name in columns if name is not None], strict=True):
        if None in column:
            raise DataError(f"{source}: row {column.index(None) + 1} has no {name}; fill it in or take it out")
    texts = [[str(text) for text in column] for column in texts]
    kind = rows.features[label]
    named = isinstance(kind, datasets.ClassLabel)
    if like is not None:
        numbers = like.classes is None
    elif wanted == "auto":
        numbers = not named and any(isinstance(v, float) and not v.is_integer() for v in values)
    else:
        numbers = wanted == "numbers"
    pair = texts[1] if second is not None else None
    if numbers:
        return Labelled(texts[0], pair, _numbers(values, source, label), None, source)
    if named and min(values) < 0:
        raise DataError(f"{source}: row {values.index(min(values)) + 1} has no {label}; use a split with labels")
    names = [kind.int2str(value) for value in values] if named else [_name(value) for value in values]
    classes = like.classes if like is not None else tuple(kind.names) if named else _in_order(set(names))
    assert classes is not None
    if unknown := set(names) - set(classes):
        raise DataError(f"{source}: class {min(unknown)!r} is not among the training classes {', '.join(classes[:8])}")
    if len(classes) < 2:
        raise DataError(f"{source}: every {label} is {classes[0]!r}; give examples of at least two classes")
    place = {name: number for number, name in enumerate(classes)}
    return Labelled(texts[0], pair, torch.tensor([place[name] for name in names]), classes, source)


def _numbers(values: list[Any], source: str, label: str) -> Tensor:
    numbers: list[float] = []
    for row, value in enumerate(values, 1):
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: row {row}: {label} {value!r} is not a number; set labels=classes") from error
        if not math.isfinite(number):
            raise DataError(f"{source}: row {row}: {label} is {number}; put it right or take it out")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


def _name(value: Any) -> str:
    """The name of a class: numbers that are whole are written so."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _in_order(names: set[str]) -> tuple[str, ...]:
    """By number where all names are numbers, else by letter."""
    whole = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int) if whole else sorted(names))
