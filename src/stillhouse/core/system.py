"""Systems: one published method each; its hyper-parameters, its stages, its place in the taxonomy, its claim."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from stillhouse.base.fields import check_fields
from stillhouse.base.method_facts import MethodFacts
from stillhouse.base.taxonomy import AXES, Values, checked

if TYPE_CHECKING:
    from stillhouse.core.artifact import Artifact
    from stillhouse.core.run import Run
    from stillhouse.core.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Where a system stands in the field; the axes take one or several words each: see `stillhouse.base.taxonomy`."""

    title: str
    domain: str
    family: str
    citation: str = ""
    card: int | None = None
    feedback: Values = "none"
    teacher_access: Values = "white-box"
    granularity: Values = "token"
    policy: Values = "off-policy"
    elicitation: Values = "none"
    algorithm: Values = "none"
    knowledge: Values = "response"
    scheme: Values = "offline"
    modality: Values = "text"
    skill: Values = "none"
    vertical: Values = "none"
    role: Values = "none"
    stages: int | str = 1
    facts: MethodFacts | None = None

    def __post_init__(self) -> None:
        for axis in AXES:
            object.__setattr__(self, axis, checked(axis, getattr(self, axis)))


@dataclass(kw_only=True)
class Claim:
    """A paper's central statement as an experiment.

    Args:
        statement, metric: what is claimed and what is measured, in words, with its unit.
        method, baseline: names of two entries of ``variants``.
        variants: ``name -> (system name, field overrides)``, of one budget; several claims may share them.
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
    smoke: ClassVar[Mapping[str, Any]] = {}  # field values with which the tests of all systems run it in seconds
    recipes: ClassVar[Mapping[tuple[str, str], Mapping[str, Any]]] = {}  # fields for an elicitation and an algorithm
    product: ClassVar[str] = "student"  # the stage whose artifact is the result

    seed: Annotated[int, "fixes every random choice of the run"] = 0

    def __post_init__(self) -> None:
        self.__dict__.update(explicit=frozenset(), read=set())

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
        own = object.__getattribute__(self, "__dict__")  # class variables are not in it
        if name in own and name in type(self).__dataclass_fields__ and "read" in own:
            own["read"].add(name)
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
        return json.loads(json.dumps({f.name: self.__dict__[f.name] for f in fields(self)}, default=str))


def configure(cls: type[System], values: Mapping[str, Any]) -> System:
    """Build a system from explicit values; on the embedded task its ``demo`` values fill in the rest."""
    explicit = check_fields(cls, values, owner=cls.name())
    system = cls(**explicit)
    if system.is_demo():
        system = cls(**{**check_fields(cls, cls.demo, owner=f"{cls.name()} (demo)"), **explicit})
    system.__dict__.update(explicit=frozenset(explicit), read=set())
    return system
