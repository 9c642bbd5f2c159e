"""Artifacts: what a stage leaves on disk, and how it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from stillhouse.base.errors import RunError
from stillhouse.base.table import Table


@dataclass(frozen=True)
class Artifact:
    """What a finished stage left: a folder, what kind of thing is in it, and the stage's final figures."""

    path: Path
    kind: str = "none"
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""

    def load_into(self, module: nn.Module) -> nn.Module:
        """Put the saved weights into ``module``, which must have the same shape; returns it."""
        file = self.path / "model.safetensors"
        if not file.exists():
            raise RunError(f"{self.path} holds no model.safetensors to load")
        load_model(module, file)
        return module

    def table(self) -> Table:
        """The table an `Evaluate` or `Audit` stage left."""
        return Table.from_json(self.json("table.json"))

    def json(self, name: str = "value.json") -> Any:
        """The content of a JSON file of the artifact."""
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def data_file(self) -> Path:
        """The Parquet file a data stage left."""
        return self.path / "data.parquet"


Saver = Callable[[Any, Path], None]


def save_artifact(value: Any, folder: Path) -> str:
    """Write ``value`` into ``folder`` in the format of its own ecosystem; returns the artifact's kind."""
    if value is None:
        return "files" if any(folder.iterdir()) else "none"
    if isinstance(value, Table):
        (folder / "table.json").write_text(json.dumps(value.to_json(), indent=1), encoding="utf-8")
        return "table"
    if hasattr(value, "save_pretrained"):
        value.save_pretrained(folder)
        return "model"
    if isinstance(value, nn.Module):
        save_model(value, str(folder / "model.safetensors"))
        return "model"
    if hasattr(value, "to_parquet"):
        value.to_parquet(folder / "data.parquet")
        return "data"
    if isinstance(value, dict | list | int | float | str):
        (folder / "value.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
        return "value"
    raise TypeError(f"a stage returned a {type(value).__name__}, which has no file format here; write files instead")
