"""The systems: one published method a file, in folders by domain, found by discovery."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
import types
from pathlib import Path

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.core.system import System


@functools.cache
def all_systems() -> dict[str, type[System]]:
    """Every system by name: a new file in this package is a new system."""
    found: dict[str, type[System]] = {}
    for info in pkgutil.walk_packages(__path__, __name__ + "."):
        if not info.ispkg:
            system = _system_in(importlib.import_module(info.name))
            found[system.name()] = system
    return dict(sorted(found.items()))


def get_system(name: str) -> type[System]:
    """The system called ``name``, or the one defined in the Python file ``name``."""
    if name.endswith(".py"):
        return _system_in(_load_file(Path(name)))
    systems = all_systems()
    if name not in systems:
        raise ConfigError(f"there is no system {name!r}{suggest(name, systems)}")
    return systems[name]


def _system_in(module: types.ModuleType) -> type[System]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, System) and value.__module__ == module.__name__
    ]
    if len(classes) != 1 or "meta" not in vars(classes[0]):
        raise ConfigError(f"{module.__name__} must define exactly one System with a meta; it defines {len(classes)}")
    return classes[0]


def _load_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    name = f"stillhouse.systems.from_file.{path.stem}"  # never the name of a real module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
