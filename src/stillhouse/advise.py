"""Advice before anything is trained: which teacher a student of a given size should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.base.errors import ConfigError, RunError
from stillhouse.metrics.capacity_law import PUBLISHED_K, recommend_teacher
from stillhouse.models.causal_lm import read_config
from stillhouse.models.scaling import config_parameters
from stillhouse.models.sizes import format_size, is_size, parse_size
from stillhouse.runs import run_record, stage_artifacts


@dataclass(frozen=True)
class Law:
    """How many times the student's size the best teacher has, and where that is known from."""

    k: float
    source: str
    interval: tuple[float, float] | None = None


PUBLISHED = Law(
    PUBLISHED_K, "about 2.5, published: Zhang et al. (ACL 2025, arXiv 2311.07052), over GPT-2 and Pythia below 3B"
)


@dataclass(frozen=True)
class TeacherAdvice:
    """The best of the teachers there are.

    Attributes:
        wanted: the size that the law asks for, k N_S.
        teacher: of ``sizes``, the one nearest to it in logarithm; None if there are none.
        sizes: parameters of each teacher, by the name it was given by.
        notes: what else the user should know.
    """

    student: float
    wanted: float
    law: Law
    teacher: str | None
    sizes: dict[str, float]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        law = {"k": self.law.k, "source": self.law.source, "interval": self.law.interval}
        return {**self.__dict__, "law": law}


def model_size(entry: str, *, trust_remote_code: bool = False) -> float:
    """The parameters of ``entry``: a number (1.1B), or a causal language model, of which only the config is read."""
    if is_size(entry) and not Path(entry).exists():
        return parse_size(entry)
    return float(config_parameters(read_config(entry, trust_remote_code=trust_remote_code)))


def law_of_run(folder: Path) -> Law:
    """The law that a finished run of ``capacity-gap`` found.

    Raises:
        RunError: ``folder`` is no run, or has found no law yet.
    """
    run_record(folder)
    law = stage_artifacts(folder).get("law")
    if law is None or not (law.path / "law.json").exists():
        raise RunError(f"{folder} has no law; give a finished run of capacity-gap")
    found = law.json("law.json")
    interval = tuple(found["interval"]) if found["interval"] else None
    edges = sum(point["at_edge"] for point in found["points"])
    source = f"measured by {folder} on {len(found['points'])} student size(s)"
    return Law(found["k"], source + (f", {edges} of them at an edge of its grid" if edges else ""), interval)


def advise_teacher(
    student: str, teachers: Sequence[str] = (), *, law: Law = PUBLISHED, trust_remote_code: bool = False
) -> TeacherAdvice:
    """Which of ``teachers`` should teach a student: the one nearest in log size to k N_S.

    Args:
        student, teachers: sizes, directories or hub ids; see `model_size`.

    Raises:
        ConfigError: k is not positive.
        ModelError: an entry is neither a size nor a model.
    """
    if law.k <= 0:
        raise ConfigError(f"k={law.k}: must be above 0")
    size = model_size(student, trust_remote_code=trust_remote_code)
    sizes = {entry: model_size(entry, trust_remote_code=trust_remote_code) for entry in teachers}
    chosen = recommend_teacher(size, sizes, k=law.k) if sizes else None
    notes = []
    if chosen is not None and sizes[chosen] <= size:
        notes.append("none of the teachers near that size is larger than the student")
    elif chosen is not None and not 0.5 < sizes[chosen] / (law.k * size) < 2:
        notes.append(
            f"it is {sizes[chosen] / size:.2g} times the student; one nearer to {law.k:.2g} times would do better"
        )
    if law.k < 1:
        notes.append("this law asks for teachers smaller than the student: its sweep did not reach larger ones")
    return TeacherAdvice(size, law.k * size, law, chosen, sizes, notes)


def in_words(advice: TeacherAdvice) -> str:
    """The advice as lines of text."""
    law = advice.law
    between = f" [{law.interval[0]:.2f}, {law.interval[1]:.2f}]" if law.interval else ""
    lines = [
        f"student  {format_size(advice.student)} parameters",
        f"k        {law.k:.3g}{between}: {law.source}",
        f"wanted   a teacher of about {format_size(advice.wanted)}",
    ]
    for name, size in sorted(advice.sizes.items(), key=lambda item: item[1]):
        mark = "->" if name == advice.teacher else "  "
        lines.append(f"{mark} {name}  {format_size(size)}  ({size / advice.student:.2g} x)")
    return "\n".join([*lines, *(f"note     {note}" for note in advice.notes)])
