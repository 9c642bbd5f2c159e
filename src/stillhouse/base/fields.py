"""Typed fields: dataclass fields as configuration, checked with errors that say what is allowed.

``Annotated[float, "help", Ge(0)]`` gives a field its help and its limits; pydantic does the checking.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from stillhouse.base.errors import ConfigError, suggest


def field_hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, with their ``Annotated`` metadata."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def field_help(hint: Any) -> str:
    """The help text of a field: the first string in its ``Annotated`` metadata."""
    return next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)), "")


def field_type(hint: Any) -> str:
    """A field's type and limits in words a user reads."""
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(base) is Literal:
        text = " | ".join(repr(arg) for arg in typing.get_args(base))
    elif isinstance(base, types.UnionType):
        text = " | ".join("none" if arg is type(None) else getattr(arg, "__name__", str(arg)) for arg in base.__args__)
    else:
        text = getattr(base, "__name__", str(base))
    limits = [
        f"{sign} {getattr(note, key)}"
        for note in getattr(hint, "__metadata__", ())
        for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(note, key)
    ]
    return text + (f" ({', '.join(limits)})" if limits else "")


def _alternatives(base: Any) -> tuple[Any, ...]:
    """The members of ``a | b``."""
    return base.__args__ if isinstance(base, types.UnionType) else ()


def check_value(owner: str, name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` asks for; a `ConfigError` names the field, the value and what is allowed."""
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if isinstance(value, str):  # as typed on a command line
        if value.strip().lower() in ("none", "null") and type(None) in typing.get_args(base):
            value = None
        elif any(typing.get_origin(one) in (list, tuple) for one in (base, *_alternatives(base))):
            value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:  # a number typed where text is expected: `student=12`
                return TypeAdapter(hint).validate_python(str(value))
            except ValidationError:
                pass
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{owner}: {name}={value!r} is not allowed ({reason}); expected {field_type(hint)}") from None


def check_fields(cls: type, values: Mapping[str, Any], *, owner: str) -> dict[str, Any]:
    """Check ``values`` against the fields of dataclass ``cls``."""
    hints = field_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{owner} has no field {name!r}{suggest(name, hints)}")
    return {name: check_value(owner, name, value, hints[name]) for name, value in values.items()}
