"""Finding one's way among the systems: what is covered, what lies near, what an access excludes, who does a cell.

The axes are those of the survey of distilling language models (Xu et al., 2024, arXiv 2402.13116, card 165): a cell is
what is elicited from the teacher and the algorithm by which it is learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.base.taxonomy import AXES, checked
from stillhouse.catalogue import row
from stillhouse.systems import all_systems, get_system

Cell = tuple[str, str]
NEAR = tuple(axis for axis in AXES if axis not in ("skill", "vertical", "role"))

ACCESS = ("teacher-free", "black-box", "logits", "white-box")
"""What there may be of a teacher, from nothing to its weights; ``logits``: probabilities beside the text."""

NEEDS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("feedback", "logits"): ("logits", "an interface that gives the probabilities of tokens"),
    ("feedback", "features"): ("white-box", "the teacher's weights: hidden states are read"),
    ("feedback", "relations"): ("white-box", "the teacher's weights: relations of hidden states or attention are read"),
    ("feedback", "scores"): ("white-box", "the teacher's weights: its score is asked at any point"),
    ("elicitation", "labelling"): ("black-box", "a teacher that answers"),
    ("elicitation", "expansion"): ("black-box", "a teacher that answers"),
    ("elicitation", "feature"): ("logits", "at least the probabilities of the teacher's outputs"),
    ("elicitation", "feedback"): ("black-box", "a teacher that judges"),
    ("algorithm", "similarity"): ("white-box", "the teacher's weights: features are compared"),
}
"""What a value of an axis needs of the teacher at least, and why."""


def tags(record: Mapping[str, Any], axes: Iterable[str] = NEAR) -> set[tuple[str, str]]:
    """The values of a record on the axes, without ``none``."""
    return {(axis, value) for axis in axes for value in record[axis] if value != "none"}


def jaccard(one: set[Any], other: set[Any]) -> float:
    """Shared over all; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one | other else 1.0


def nearest(name: str, count: int = 5) -> dict[str, float]:
    """The systems that share most values of the taxonomy with ``name``, and the Jaccard index of each."""
    wanted = get_system(name)
    own = tags(row(wanted))
    found = {other: jaccard(own, tags(row(system))) for other, system in all_systems().items() if system is not wanted}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count])


def cells(record: Mapping[str, Any], recipes: Mapping[Cell, Any] | None = None) -> list[Cell]:
    """Where a system stands: at its recipes if it has some, else at every pair of its values."""
    return list(recipes or ()) or [(e, a) for e in record["elicitation"] for a in record["algorithm"]]


def coverage(records: Sequence[Mapping[str, Any]]) -> dict[Cell, list[str]]:
    """The names of the systems in each cell of elicitation x algorithm, ``none`` left out; gaps have no name."""
    known = all_systems()
    found: dict[Cell, list[str]] = {
        (e, a): [] for e in AXES["elicitation"] for a in AXES["algorithm"] if "none" not in (e, a)
    }
    for record in records:
        recipes = known[record["name"]].recipes if record["name"] in known else {}
        for cell in cells(record, recipes):
            if cell in found:
                found[cell].append(record["name"])
    return found


def gaps(covered: Mapping[Cell, list[str]]) -> list[Cell]:
    """The cells without a system."""
    return [cell for cell, names in covered.items() if not names]


def coverage_lines(covered: Mapping[Cell, list[str]]) -> list[list[str]]:
    """The matrix as lines of a table, one a cell that has systems, and one an elicitation for its gaps."""
    lines = []
    for elicitation in dict.fromkeys(e for e, _ in covered):
        own = {a: names for (e, a), names in covered.items() if e == elicitation}
        lines += [[elicitation, a, str(len(names)), ", ".join(names)] for a, names in own.items() if names]
        missing = [a for a, names in own.items() if not names]
        if missing:
            lines.append([elicitation, ", ".join(missing), "0", "–"])
    return lines


def level(access: str) -> int:
    """The place of an access among `ACCESS`; raises `ConfigError` for one that is none."""
    if access not in ACCESS:
        raise ConfigError(f"access={access!r}: one of {', '.join(ACCESS)}{suggest(access, ACCESS)}")
    return ACCESS.index(access)


def excluded(access: str, **wanted: str) -> list[str]:
    """Why what is wanted cannot be had with this access to the teacher; nothing if it can.

    ``excluded("black-box", elicitation="feature", algorithm="divergence")``
    """
    held = level(access)
    reasons = []
    for axis, value in wanted.items():
        least, why = NEEDS.get((axis, checked(axis, value)[0]), (ACCESS[0], ""))
        if held < level(least):
            reasons.append(f"{axis} {value!r} needs {why}; there is {access}")
    return reasons


def least_access(record: Mapping[str, Any]) -> str:
    """The least access with which a system, as it is made here, can run."""
    levels = []
    for access in record["teacher_access"]:
        probabilities = access == "black-box" and "logits" in record["feedback"]
        levels.append(level("logits" if probabilities else access))
    return ACCESS[min(levels)]


def problems(record: Mapping[str, Any]) -> list[str]:
    """What in a record contradicts itself: a black box that is looked into."""
    if "white-box" in record["teacher_access"] or "teacher-free" in record["teacher_access"]:
        return []
    return [
        f"{record['name']}: teacher_access='black-box', but {axis} {value!r} needs {why}"
        for (axis, value), (least, why) in NEEDS.items()
        if least == "white-box" and value in record[axis]
    ]


@dataclass(frozen=True)
class Recipe:
    """A system and the fields with which it does what a cell says."""

    system: str
    fields: Mapping[str, Any]
    domain: str
    access: str
    verdict: str | None

    def command(self) -> str:
        """What to type."""
        values = [f"{name}={value}" for name, value in self.fields.items()]
        return " ".join(["stillhouse run", self.system, *values])

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "fields": dict(self.fields), "command": self.command()}


def recipes_for(elicitation: str, algorithm: str, *, access: str = "white-box", domain: str = "") -> list[Recipe]:
    """The runnable recipes of a cell, the most specific first: those made for it, then by how little else they do.

    Args:
        access: what there is of the teacher: one of `ACCESS`.
        domain: only systems of domains whose name contains this.

    Raises:
        ConfigError: a word outside the taxonomy, or an access that excludes the cell.
    """
    cell = (*checked("elicitation", elicitation), *checked("algorithm", algorithm))
    reasons = excluded(access, elicitation=elicitation, algorithm=algorithm)
    if reasons:
        raise ConfigError("; ".join(reasons))
    found = []
    for name, system in all_systems().items():
        record = row(system)
        places = cells(record, system.recipes)
        if cell in places and domain.lower() in record["domain"].lower():
            recipe = Recipe(
                name, system.recipes.get(cell, {}), record["domain"], least_access(record), record["verdict"]
            )
            if level(recipe.access) <= level(access):
                alone = 0 if system.recipes else len(places)
                found.append((alone, recipe.verdict != "shown", name, recipe))
    return [recipe for *_, recipe in sorted(found, key=lambda one: one[:3])]
