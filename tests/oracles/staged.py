"""Walks through a system's stages without training: what each stage is given can then be asked of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Generate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train


def walk(system: System, folder: Path, *, metrics: Mapping[str, float] | None = None) -> Walked:
    """The stages of a system by name, and what they left: ``metrics`` for all of them.

    Of a stage that trains this is its model with every weight moved a little, by an amount that depends on the stage's
    name: no two stages leave the same. Records are written in earnest; evaluations, audits and copies are left out.
    """
    run = Run(folder, quiet=True)
    done = Walked()
    generator: Any = system.stages(run)
    sent: Artifact | None = None
    while True:
        try:
            stage = generator.send(sent)
        except StopIteration:
            return done
        assert stage.name not in done.stages
        done.stages[stage.name] = stage
        sent = done.artifacts[stage.name] = _left(stage, run, folder / "stages" / stage.name, dict(metrics or {}))


class Walked:
    """Stages and artifacts by name."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.artifacts: dict[str, Artifact] = {}

    def train(self, name: str) -> Train:
        stage = self.stages[name]
        assert isinstance(stage, Train)
        return stage


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """A system's own fields among what `helpers.small_values` gives, which runs take too."""
    return {name: value for name, value in values.items() if name not in ("trackers", "checkpoint_minutes")}


def player(stage: Train) -> Any:
    """The one player of a stage."""
    if callable(stage.players):
        stage.players = stage.players()
    return stage.players


def model(stage: Train) -> Any:
    """The model that a stage trains."""
    return player(stage).trained[0].module


def objective(stage: Train) -> Any:
    return player(stage).objective


@torch.no_grad()
def moved(module: Any, name: str, size: float = 0.05) -> Any:
    """``module`` with every weight moved by a normal deviate that ``name`` fixes."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for parameter in module.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


@torch.no_grad()
def log_probabilities(of: Any, batch: Mapping[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """log p of the next token at all places but the last, from nothing but the model's forward: (B, T - 1, V)."""
    logits = of.eval()(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return (logits[:, :-1].double() / temperature).log_softmax(-1)


def _left(stage: Stage, run: Run, folder: Path, metrics: dict[str, float]) -> Artifact:
    folder.mkdir(parents=True)
    if isinstance(stage, Generate):
        return Artifact(
            folder / "artifact", stage.execute(Context(run, folder, stage.name, seed=0)), metrics, stage.name
        )
    if isinstance(stage, Train):
        assert stage.save is not None
        before = {name: value.clone() for name, value in model(stage).state_dict().items()}
        (folder / "artifact").mkdir()
        stage.save(moved(model(stage), stage.name), folder / "artifact")
        model(stage).load_state_dict(before)
    return Artifact(folder / "artifact", "model", metrics, stage.name)
