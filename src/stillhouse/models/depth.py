"""The depth of a ``transformers`` model: its layers, and a copy without some of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from stillhouse.base.errors import ModelError


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of a model's layers, in order: the list that is as long as its config says.

    Raises:
        ModelError: it has no such list.
    """
    config: Any = model.config
    count = config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{path}.{number}" for number in range(count)]
    raise ModelError(f"{type(model).__name__}: has no list of {count} layers, as its config says; use another model")


def with_layers(model: Any, kept: Sequence[int]) -> Any:
    """A copy of a model with some of its layers, in the order of ``kept``; it saves and loads like any other.

    Raises:
        ModelError: as `layer_paths`, or no layer is kept, or one that is not there.
    """
    paths = layer_paths(model)
    if not kept or any(not 0 <= number < len(paths) for number in kept):
        raise ModelError(f"layers {list(kept)} cannot be kept: {type(model).__name__} has 0 to {len(paths) - 1}")
    copied = copy.deepcopy(model)
    layers = nn.ModuleList([copied.get_submodule(paths[number]) for number in kept])
    for place, layer in enumerate(layers):
        parts: Any = layer.modules()
        for part in parts:
            if hasattr(part, "layer_idx"):  # where the layer finds itself in a cache
                part.layer_idx = place
    copied.set_submodule(paths[0].rpartition(".")[0], layers)
    copied.config.num_hidden_layers = len(layers)
    kinds = getattr(copied.config, "layer_types", None)  # of models whose layers differ
    if kinds is not None:
        copied.config.layer_types = [kinds[number] for number in kept]
    return copied
