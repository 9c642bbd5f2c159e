"""Text by domain: a folder for each, a source for each, or a column that names it."""

from __future__ import annotations

from pathlib import Path

from stillhouse.base.errors import DataError
from stillhouse.data.encoding import digest
from stillhouse.data.text import SUFFIXES, Policy, TextData, load_text


def load_domains(
    source: str,
    *,
    domain_field: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    on_bad_record: Policy = "error",
) -> dict[str, TextData]:
    """Name of a domain -> its documents.

    Args:
        source: with ``domain_field``, anything that `load_text` reads. Without it, a folder whose sub-folders and data
            files are the domains, or ``NAME=SOURCE,NAME=SOURCE,...`` with sources that `load_text` reads.
        domain_field: the field or column of each record that names its domain.
        split, text_field, on_bad_record: as in `load_text`.

    Raises:
        DataError: fewer than two domains, or what `load_text` has to say.
    """

    def read(part: str, field: str | None = text_field) -> TextData:
        return load_text(part, split=split, text_field=field, on_bad_record=on_bad_record)

    if domain_field is not None:
        found = _by_field(read(source), read(source, domain_field), domain_field)
    elif "=" in source and not Path(source).expanduser().exists():
        found = {name: read(path) for name, path in named_sources(source).items()}
    else:
        found = {name: read(str(path)) for name, path in _parts(source).items()}
    if len(found) < 2:
        raise DataError(f"{source}: one domain only ({', '.join(found)}); a mixture needs at least two")
    if len(kinds := {text.kind for text in found.values()}) > 1:
        raise DataError(f"{source}: domains of several forms ({', '.join(sorted(kinds))}); give all of them one form")
    return found


def named_sources(source: str) -> dict[str, str]:
    """``NAME=SOURCE,NAME=SOURCE,...``, taken apart.

    Raises:
        DataError: a part without a name or a source, or a name twice.
    """
    parts = [part.strip().partition("=") for part in source.split(",")]
    if not all(name and path for name, _, path in parts) or len({name for name, *_ in parts}) < len(parts):
        raise DataError(f"{source}: write NAME=SOURCE,NAME=SOURCE,... with a name of its own for each")
    return {name: path for name, _, path in parts}


def _parts(source: str) -> dict[str, Path]:
    """The domains in a folder."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{source}: no folder; give one with a sub-folder or file for each domain, NAME=SOURCE,..., or the column "
            "that names it as domain_field"
        )
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    chosen = [path for path in inside if path.is_dir() or path.suffix.lower() in SUFFIXES]
    names = [path.name if path.is_dir() else path.stem for path in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{source}: two domains are called {twice[0]!r}; put their files into one folder")
    if not chosen:
        raise DataError(f"{source}: no sub-folder and no data file in it; give each domain one")
    return dict(zip(names, chosen, strict=True))


def _by_field(texts: TextData, names: TextData, field: str) -> dict[str, TextData]:
    if len(texts.documents) != len(names.documents):
        raise DataError(
            f"{texts.name}: {len(texts.documents)} records with text and {len(names.documents)} with {field!r}; put "
            "those right that lack one of them"
        )
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names.documents["text"]):
        places.setdefault(name, []).append(place)
    return {
        name: TextData(texts.documents.select(places[name]), texts.kind, name, digest(texts.fingerprint, field, name))
        for name in sorted(places)
    }
