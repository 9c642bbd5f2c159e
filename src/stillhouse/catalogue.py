"""What is here: systems by taxonomy and verdict, one system in full, the installation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import shutil
from pathlib import Path
from typing import Any

from stillhouse.base.facts import machine, versions
from stillhouse.base.fields import field_help, field_hints, field_type
from stillhouse.base.files import read_json
from stillhouse.core.run import cache_folder
from stillhouse.core.system import System
from stillhouse.systems import all_systems, get_system

RESULTS = Path("results/claims")  # of the current folder; verdicts shown come from the checkout otherwise
CHECKOUT = Path(__file__).parents[2] / RESULTS

EXTRAS = ("wandb", "mlflow", "trackio", "deepspeed", "peft", "usearch", "trl")


def verdict(name: str) -> str | None:
    """The committed verdict on a system's first claim, or None."""
    files = (folder / f"{name}.json" for folder in (RESULTS, CHECKOUT))
    return next((read_json(file)["verdict"] for file in files if file.exists()), None)


def row(system: type[System]) -> dict[str, Any]:
    """A system's place in the taxonomy, as one flat record."""
    return {"name": system.name(), **dataclasses.asdict(system.meta), "verdict": verdict(system.name())}


def rows(**wanted: str) -> list[dict[str, Any]]:
    """All systems, or those where every named axis contains the wanted text."""
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
