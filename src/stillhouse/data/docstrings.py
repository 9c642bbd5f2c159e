"""Questions about Python's own functions with their first lines of documentation as answers: small, clean data."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Iterator
from pathlib import Path

from stillhouse.base.errors import DataError
from stillhouse.data.encoding import digest
from stillhouse.data.preferences import Preference
from stillhouse.data.text import TextData, load_text

MODULES = (
    "array", "ast", "base64", "bisect", "builtins", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "difflib", "fnmatch", "fractions", "functools", "graphlib", "hashlib", "heapq",
    "html", "inspect", "itertools", "json", "math", "mimetypes", "operator", "os.path", "pathlib", "pprint",
    "queue", "random", "re", "shlex", "shutil", "statistics", "string", "struct", "textwrap", "threading",
    "tokenize", "urllib.parse", "uuid", "weakref", "zlib",
)  # fmt: skip


def docstrings() -> Iterator[tuple[str, str]]:
    """(question, answer) for the public functions, classes and methods of some of Python's modules."""
    for path in MODULES:
        module = importlib.import_module(path)
        for name in sorted(vars(module)):
            thing = vars(module)[name]
            if name.startswith("_") or not callable(thing) or getattr(thing, "__module__", path) not in (path, None):
                continue
            methods = vars(thing) if inspect.isclass(thing) else {}
            found = {
                f"{path}.{name}": thing,
                **{f"{path}.{name}.{m}": methods[m] for m in sorted(methods) if m[0] != "_"},
            }
            for title, item in found.items():
                line = (inspect.getdoc(item) or "").strip().split("\n\n")[0].replace("\n", " ")
                own = getattr(item, "__module__", path) in (path, None)  # libraries add methods to classes of others
                if callable(item) and own and 20 < len(line) < 240:
                    yield f"What is {title}?", line


def _pairs() -> list[tuple[str, str]]:
    """One question for each answer, the first: methods share documentation, and held-out answers must not be known."""
    first: dict[str, tuple[str, str]] = {}
    for question, answer in docstrings():
        first.setdefault(" ".join(answer.casefold().rstrip(" .").split()), (question, answer))
    return list(first.values())


def load_quality(source: str) -> TextData:
    """Clean data by name (see `load_text`); ``demo``: `docstrings` as prompts and completions."""
    if source != "demo":
        return load_text(source)
    import datasets

    pairs = _pairs()
    columns = {"prompt": [prompt for prompt, _ in pairs], "completion": [answer for _, answer in pairs]}
    return TextData(datasets.Dataset.from_dict(columns), "prompt-completion", "docstrings", digest("docstrings", pairs))


def load_preferences(source: str, *, seed: int = 0) -> list[Preference]:
    """Pairs from a file (.jsonl, .json or .parquet with ``prompt``, ``chosen``, ``rejected``).

    ``demo``: docstrings, with that of something else as the worse answer.

    Raises:
        DataError: no such file, or a record without one of the three.
    """
    if source == "demo":
        pairs = _pairs()
        other = [answer for _, answer in pairs]
        random.Random(seed).shuffle(other)
        return [Preference(p, a, b) for (p, a), b in zip(pairs, other, strict=True) if a != b]
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix.lower())
    if kind is None or not Path(source).is_file():
        raise DataError(f"{source}: no such .jsonl, .json or .parquet file of preferences; check the path")
    rows = datasets.load_dataset(kind, data_files=source, split="train")
    missing = {"prompt", "chosen", "rejected"} - set(rows.column_names)
    if missing:
        raise DataError(
            f"{source}: its records have no {', '.join(sorted(missing))}; each needs a prompt and two answers"
        )
    return [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
