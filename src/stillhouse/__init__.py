"""Stillhouse: staged distillation. One small core, orthogonal parts, published systems as short compositions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.core.artifact import Artifact
    from stillhouse.core.ema import EMA
    from stillhouse.core.objective import Objective, Term
    from stillhouse.core.observed import Batch, Observed, Signal
    from stillhouse.core.player import Player, adamw, sgd
    from stillhouse.core.run import Run
    from stillhouse.core.schedule import constant, cosine, linear, piecewise, sigmoid, step, wsd
    from stillhouse.core.stage import Audit, Context, Evaluate, Generate, Stage, Transform
    from stillhouse.core.system import Claim, Meta, System
    from stillhouse.core.train import Train
    from stillhouse.data.sources import Batches
    from stillhouse.objectives import CrossEntropy, FeatureMSE, KLDivergence, LogitMatch, TokenCrossEntropy, TokenMatch
    from stillhouse.workflow import resume, run_system

_HOMES = {
    "stillhouse.core.artifact": ["Artifact"],
    "stillhouse.core.ema": ["EMA"],
    "stillhouse.core.objective": ["Objective", "Term"],
    "stillhouse.core.observed": ["Batch", "Observed", "Signal"],
    "stillhouse.core.player": ["Player", "adamw", "sgd"],
    "stillhouse.core.run": ["Run"],
    "stillhouse.core.schedule": ["constant", "cosine", "linear", "piecewise", "sigmoid", "step", "wsd"],
    "stillhouse.data.sources": ["Batches"],
    "stillhouse.core.stage": ["Audit", "Context", "Evaluate", "Generate", "Stage", "Transform"],
    "stillhouse.core.system": ["Claim", "Meta", "System"],
    "stillhouse.core.train": ["Train"],
    "stillhouse.objectives": [
        "CrossEntropy",
        "FeatureMSE",
        "KLDivergence",
        "LogitMatch",
        "TokenCrossEntropy",
        "TokenMatch",
    ],
    "stillhouse.workflow": ["resume", "run_system"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import stillhouse` stays fast, and the layers below never import this one.
    if name not in _HOME:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
