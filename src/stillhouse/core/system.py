"""Systems: one published method each; its hyper-parameters, its stages, its place in the taxonomy, its claim."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import TypeAdapter, ValidationError

from stillhouse.core.errors import ConfigError, suggest

if typing.TYPE_CHECKING:
    from stillhouse.core.artifact import Artifact
    from stillhouse.core.run import Run
    from stillhouse.core.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Where a system stands in the taxonomy of the field (surveys: cards 072, 151, 165)."""

    title: str
    domain: str
    family: str
    citation: str = ""
    card: int | None = None
    feedback: str = "none"  # logits, features, relations, labels, traces, rewards, scores, data, none
    teacher_access: Literal["white-box", "black-box", "none", "self"] = "white-box"
    granularity: str = "token"  # token, sequence, sample, pixel, patch, graph, data set, model
    policy: Literal["off-policy", "on-policy", "mixed", "none"] = "off-policy"
    knowledge: str = "response"  # response, feature, relation, data, score
    scheme: Literal["offline", "online", "self", "none"] = "offline"
    modality: str = "text"
    stages: int | str = 1


@dataclass(kw_only=True)
class Claim:
    """A paper's central statement as an experiment.

    Args:
        statement: what is claimed, in words.
        metric: what is measured, in words, with its unit.
        method, baseline: names of two entries of ``variants``.
        variants: ``name -> (system name, field overrides)``; all run under the same budget.
        measure: the figure of one variant, from the artifacts of its stages by name.
        higher_is_better: the direction of ``metric``.
        scope: whether this is the paper's central claim or a weaker consequence that must hold too.
        seeds: how many seeds are run.
    """

    statement: str
    metric: str
    method: str
    baseline: str
    variants: Mapping[str, tuple[str, Mapping[str, Any]]]
    measure: Callable[[Mapping[str, Artifact]], float]
    higher_is_better: bool
    scope: Literal["central", "consequence"] = "central"
    seeds: int = 5
    budget: str = ""


@dataclass(kw_only=True)
class System:
    """Base of all systems. Fields are hyper-parameters; their defaults are the paper's.

    ``Annotated[float, "help", Ge(0)]`` gives a field its help and its limits. ``demo`` holds what the embedded task
    needs instead of the paper's values; it applies only where the user set nothing and `is_demo` is true.
    """

    meta: ClassVar[Meta]
    demo: ClassVar[Mapping[str, Any]] = {}
    _set: ClassVar[Any]

    seed: Annotated[int, "fixes every random choice of the run"] = 0

    def __post_init__(self) -> None:
        self.__dict__.setdefault("explicit", frozenset())
        self.__dict__.setdefault("read", set())

    def stages(self, run: Run) -> Iterator[Stage]:
        """The method: a generator that yields stages and is sent the artifact of each."""
        raise NotImplementedError

    def claims(self) -> list[Claim]:
        """The paper's statements that can be measured here."""
        return []

    def is_demo(self) -> bool:
        """Whether this instance runs on the embedded task."""
        return True

    def __getattribute__(self, name: str) -> Any:
        # Which fields a stage reads decides when it is done again: see `Run`.
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and name in type(self).__dataclass_fields__ and "read" in self.__dict__:
            self.__dict__["read"].add(name)
        return value

    @classmethod
    def name(cls) -> str:
        """The name users type: that of the file the system is in."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def make(cls, **values: Any) -> System:
        """An instance from field values (numbers, or text as typed on a command line), checked one by one."""
        return configure(cls, values)

    def config(self) -> dict[str, Any]:
        """All field values, as plain JSON values."""
        return {f.name: _plain(self.__dict__[f.name]) for f in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


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


def check_value(owner: str, name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` asks for; a `ConfigError` names the field, the value and what is allowed."""
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and type(None) in typing.get_args(
        typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    ):
        value = None
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


def configure(cls: type[System], values: Mapping[str, Any]) -> System:
    """Build a system from explicit values; on the embedded task its ``demo`` values fill in the rest."""
    explicit = check_fields(cls, values, owner=cls.name())
    system = cls(**explicit)
    if system.is_demo():
        system = cls(**{**check_fields(cls, cls.demo, owner=f"{cls.name()} (demo)"), **explicit})
    system.__dict__["explicit"] = frozenset(explicit)
    system.__dict__["read"] = set()
    return system


@dataclass
class Catalogue:
    """All systems, found by discovery in ``stillhouse.systems``: a new file is a new system."""

    package: str = "stillhouse.systems"
    found: dict[str, type[System]] = field(default_factory=dict)

    def all(self) -> dict[str, type[System]]:
        if not self.found:
            root = importlib.import_module(self.package)
            for info in pkgutil.walk_packages(root.__path__, self.package + "."):
                if not info.ispkg:
                    self._take(importlib.import_module(info.name))
            self.found = dict(sorted(self.found.items()))
        return self.found

    def _take(self, module: types.ModuleType) -> type[System]:
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, System) and value.__module__ == module.__name__
        ]
        if len(classes) != 1 or "meta" not in vars(classes[0]):
            raise ConfigError(f"{module.__name__} must define exactly one System with a meta; it has {len(classes)}")
        return self.found.setdefault(classes[0].name(), classes[0])

    def get(self, name: str) -> type[System]:
        """The system called ``name``, or defined in the Python file ``name``."""
        if name.endswith(".py"):
            return self._take(_load_file(Path(name)))
        systems = self.all()
        if name not in systems:
            raise ConfigError(f"there is no system {name!r}{suggest(name, systems)}")
        return systems[name]


def _load_file(path: Path) -> types.ModuleType:
    import sys

    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


CATALOGUE = Catalogue()
