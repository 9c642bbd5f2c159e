"""Heads on the inside of a classifier: what a representation between two blocks says of the class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of the blocks a model runs one after the other: the first list of at least two modules in it.

    Raises:
        ModelError: it has no such list.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            return [f"{path}.{number}" for number in range(len(module))]
    raise ModelError(f"{type(model).__name__}: has no list of blocks to cut between; use a model with at least two")


@torch.no_grad()
def block_shapes(model: nn.Module, image_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """What each of `blocks_of` puts out for one image of this shape, without the batch."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out: shapes.append(tuple(_first(out).shape[1:])))
        for path in blocks_of(model)
    ]
    training = model.training
    try:
        model.eval()(pixel_values=torch.zeros(1, *image_shape))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return shapes


class ExitHead(nn.Module):
    """Classes from a representation: the mean over its places, then a linear map.

    Args:
        shape: of the representation: (C, H, W), or (T, D) for tokens.
    """

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(shape[0] if len(shape) == 3 else shape[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.mean((2, 3)) if inputs.ndim == 4 else inputs.mean(1))


class Continuation(nn.Module):
    """The rest of a classifier from a cut on: blocks, then an `ExitHead`; the first ``start`` blocks are left out."""

    def __init__(self, blocks: Sequence[nn.Module], head: ExitHead) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, inputs: Tensor, start: int = 0) -> Tensor:
        for block in self.blocks[start:]:
            inputs = _first(block(inputs))
        return self.head(inputs)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output
