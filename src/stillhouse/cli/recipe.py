"""Recipes: a system's fields in a YAML file, read strictly and written with their help."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from stillhouse.base.errors import ConfigError
from stillhouse.base.fields import field_help, field_hints, field_type
from stillhouse.core.system import System
from stillhouse.runs import RunOptions


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; tags, duplicate keys and anything but a mapping are refused with the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the recipe {path} is not UTF-8 text (byte {error.start})") from None
    yaml = YAML(typ="safe", pure=True)
    try:
        for event in YAML(pure=True).parse(text):
            if getattr(event, "tag", None):
                raise ConfigError(f"{path}, line {event.start_mark.line + 1}: YAML tags ({event.tag}) are not allowed")
        content = yaml.load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}, line {line}: {' '.join(str(error.problem).split())}; keep one") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, Mapping):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path} holds {kind}, not a mapping of fields; see `stillhouse config NAME`")
    for key in content:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the field name {key!r} is not text")
    for name in ("system", "output"):
        if not isinstance(content.get(name), str | None):
            raise ConfigError(f"{path}: {name}={content[name]!r} is not text")
    return dict(content)


def without_defaults(cls: type[System], values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values without those left at their default: they count as not set, as `write_recipe` says."""
    defaults = {f.name: _as_read(_default(f)) for f in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name not in defaults or defaults[name] != _as_read(value)}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _as_read(value: Any) -> Any:
    """A value as YAML gives it back: it has lists, and no tuples."""
    return list(value) if isinstance(value, tuple) else value


def write_recipe(cls: type[System], name: str) -> str:
    """All fields of a system and of a run with defaults and help, as a YAML file that `read_recipe` takes."""
    document = CommentedMap({"system": name})
    start = f"{cls.meta.title}. {cls.meta.citation}".strip()
    note = "A value left at its default counts as not set: on the embedded task the demo's value applies (`show NAME`)."
    document.yaml_set_start_comment(f"{start}\n{note}")
    for title, part in (("the method", cls), ("the run", RunOptions)):
        hints = field_hints(part)
        for position, f in enumerate(dataclasses.fields(part)):
            document[f.name] = _default(f)
            note = f"{field_help(hints[f.name])} [{field_type(hints[f.name])}]"
            before = f"\n-- {title} --\n{note}" if position == 0 else note
            document.yaml_set_comment_before_after_key(f.name, before=before)
    yaml = YAML()
    yaml.width = 200
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = io.StringIO()
    yaml.dump(document, stream)
    return stream.getvalue()


def parse_overrides(words: list[str]) -> dict[str, str]:
    """``key=value`` words as a mapping; later ones win."""
    values = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ConfigError(f"{word!r} is not of the form field=value")
        values[key.strip()] = value
    return values
