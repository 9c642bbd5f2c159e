"""Players: the trainable sides of a stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.core.ema import EMA
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import AdaptiveSchedule, Constant, Schedule

OptimizerFactory = Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer]


def adamw(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> OptimizerFactory:
    """AdamW; parameters with fewer than two dimensions (biases, norms) are not decayed."""

    def build(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        parameters = [parameter for group in groups for parameter in group["params"]]
        split = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in split if g["params"]], lr=lr, betas=betas, eps=eps)

    return build


def sgd(
    lr: float = 0.1, *, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> OptimizerFactory:
    """SGD with momentum."""

    def build(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    return build


@dataclass(eq=False)
class Player:
    """One trainable side of a stage.

    Args:
        name: in logs and checkpoints.
        models: the observed model(s) it trains.
        objective: what it minimises.
        optimizer: called with parameter groups, gives a ``torch.optim.Optimizer`` (`adamw`, `sgd`, or any callable).
        lr: factor on the optimizer's learning rate over the run; one with state is saved with the objective.
        every: it plays in steps 0, every, 2 * every, ...
        repeats: turns per step, each on a fresh batch.
        clip: largest gradient norm; None leaves gradients alone.
        ema: updated after each of its optimizer steps.
        trainable: which parameters it trains: a regular expression searched in the parameter's name, or a predicate
            on the name; None trains all that require gradients.
        source: its own stream of batches; None reads the stage's.
    """

    name: str
    models: Observed | Sequence[Observed]
    objective: Objective
    _: KW_ONLY
    optimizer: OptimizerFactory = field(default_factory=adamw)
    lr: Schedule | AdaptiveSchedule = Constant(1.0)
    every: int = 1
    repeats: int = 1
    clip: float | None = None
    ema: EMA | None = None
    trainable: str | Callable[[str], bool] | None = None
    source: Any = None

    def __post_init__(self) -> None:
        self.trained = [self.models] if isinstance(self.models, Observed) else list(self.models)
        if self.every < 1 or self.repeats < 1:
            raise ConfigError(f"player {self.name!r}: every and repeats must be at least 1")
        if isinstance(self.lr, AdaptiveSchedule):
            self.objective.add_module("learning_rate", self.lr)
        for model in self.trained:
            if model.frozen:
                raise ConfigError(f"player {self.name!r} trains {model.name}, which was observed with frozen=True")
            if self.trainable is not None:
                _filter(model.module, self.trainable)
        if not self.parameters():
            raise ConfigError(f"player {self.name!r} has no parameter to train")

    def parameters(self) -> list[nn.Parameter]:
        """Everything it trains: of its models, then of its objective; each parameter once."""
        modules = [*(model.module for model in self.trained), self.objective]
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    def plays(self, step: int) -> bool:
        """Whether ``step`` is one of its turns."""
        return step % self.every == 0


def _filter(module: nn.Module, trainable: str | Callable[[str], bool]) -> None:
    wanted = trainable if callable(trainable) else re.compile(trainable).search
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(bool(wanted(name)))
