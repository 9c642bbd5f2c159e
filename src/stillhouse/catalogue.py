"""What is here: systems by taxonomy and verdict, one system in full, the installation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.base.facts import machine, versions
from stillhouse.base.fields import field_help, field_hints, field_type
from stillhouse.base.files import read_json
from stillhouse.core.run import cache_folder
from stillhouse.core.system import System
from stillhouse.systems import all_systems, get_system
from stillhouse.tasks.policies import PolicySystem

RESULTS = Path("results/claims")  # of the current folder; verdicts shown come from the checkout otherwise
CHECKOUT = Path(__file__).parents[2] / RESULTS

FACTS = ("year", "divergence", "own_text", "sampler", "needs", "reward", "drawing", "beside", "memory")
PARAMETERS = {"jsd": ("beta",), "skew-forward": ("skew",), "skew-reverse": ("skew",), "alpha-beta": ("skew", "beta")}
EXTRAS = ("wandb", "mlflow", "trackio", "deepspeed", "peft", "usearch", "trl")


def verdict(name: str) -> str | None:
    """The committed verdict on a system's first claim, or None."""
    files = (folder / f"{name}.json" for folder in (RESULTS, CHECKOUT))
    return next((read_json(file)["verdict"] for file in files if file.exists()), None)


def row(system: type[System]) -> dict[str, Any]:
    """A system's place in the taxonomy and the facts about it, as one flat record."""
    place = {one.name: getattr(system.meta, one.name) for one in dataclasses.fields(system.meta) if one.name != "facts"}
    return {"name": system.name(), **place, **facts_of(system), "verdict": verdict(system.name())}


def facts_of(system: type[System]) -> dict[str, Any]:
    """What is known of a method: of every one ``year`` and ``needs``, of some the others of `FACTS`; None: not known.

    Stored facts (`MethodFacts`) stand beside what its citation, its axes and its fields' defaults say.
    """
    stored, defaults = system.meta.facts, {one.name: one.default for one in dataclasses.fields(system)}
    year = re.search(r"\((\d{4})\)", system.meta.citation)
    needs = ["verifier"] * ("outcomes" in system.meta.feedback)
    found: dict[str, Any] = {**dict.fromkeys(FACTS), "year": int(year[1]) if year else None}
    if stored is not None:
        needs += ["shared tokenizer"] * stored.shared_tokenizer
        found |= {"own_text": stored.own_text, "sampler": stored.sampler, "divergence": stored.divergence}
        found |= {"reward": stored.reward, "drawing": stored.drawing, "beside": stored.beside, "memory": stored.memory}
        if "divergence" in defaults:
            found["divergence"] = divergences_in(defaults)
        if issubclass(system, PolicySystem):
            found |= {"own_text": defaults["on_policy"], "sampler": sampler_in(defaults)}
    return {**found, "needs": tuple(needs)}


def divergences_in(defaults: Mapping[str, Any]) -> tuple[str, ...]:
    """The divergences among the defaults of a system's fields, each with its parameters."""
    names = dict.fromkeys(defaults[key] for key in ("divergence", "own_divergence") if defaults.get(key))
    values = {name: [f"{one}={defaults[one]:g}" for one in PARAMETERS.get(name, ())] for name in names}
    return tuple(" ".join([name, *said]) for name, said in values.items())


def sampler_in(defaults: Mapping[str, Any]) -> str:
    """Who writes what a member of the on-policy family learns from, by the defaults of its fields."""
    share, replay, beams = defaults["teacher_share"], defaults["replay"], defaults["beams"]
    own = "student" + f" with {share:g} of the teacher" * bool(share) + f", {replay} responses kept" * bool(replay)
    given = defaults["text"] + f", {beams} beams" * (defaults["text"] == "teacher" and beams > 1)
    wanted = {given: defaults["on_policy"] < 1, own: defaults["on_policy"] > 0 or bool(replay)}
    return " | ".join(who for who, writes in wanted.items() if writes)


def rows(**wanted: str) -> list[dict[str, Any]]:
    """All systems, or those where every named axis or fact contains the wanted text."""
    axes = {"access": "teacher_access"}
    found = [row(system) for system in all_systems().values()]
    return [
        one
        for one in found
        if all(text.lower() in in_words(one[axes.get(axis, axis)]).lower() for axis, text in wanted.items())
    ]


def in_words(value: Any) -> str:
    """A value of the taxonomy as text."""
    return ", ".join(value) if isinstance(value, tuple) else "–" if value is None else str(value)


def describe(name: str) -> dict[str, Any]:
    """Everything about one system, its fields included."""
    system = get_system(name)
    hints = field_hints(system)
    fields = [
        {
            "name": f.name,
            "type": field_type(hints[f.name]),
            "default": f.default,
            "demo": system.demo.get(f.name),
            "help": field_help(hints[f.name]),
        }
        for f in dataclasses.fields(system)
    ]
    return {**row(system), "doc": _doc(system), "fields": fields}


def _doc(system: type[System]) -> str:
    doc = inspect.getdoc(system) or ""
    return "" if doc.startswith(f"{system.__name__}(") else doc  # what a dataclass writes for itself


def installation() -> dict[str, dict[str, Any]]:
    """Versions, optional packages, machine and disk."""
    optional = {}
    for package in EXTRAS:
        try:
            optional[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            optional[package] = "not installed"
    cache = cache_folder()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    places = {"cache": str(cache), "free disk": f"{free / 2**30:.1f} GiB"}
    return {"versions": versions(), "optional": optional, "machine": machine(), "places": places}
