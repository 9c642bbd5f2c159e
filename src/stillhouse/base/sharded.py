"""Modules and states whose tensors are sharded over processes (FSDP2): made, and handled as if they were whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stillhouse.base.errors import RunError


def shard_blocks(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a model with FSDP2: every entry of a ``ModuleList`` is a unit, and what is left is the root's."""
    data = mesh["data_parallel"] if "data_parallel" in (mesh.mesh_dim_names or ()) else mesh
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=data)
    fully_shard(module, mesh=data)
    return module


def full(tree: Any) -> Any:
    """A state tree with sharded tensors gathered; every process must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().clone()  # its storage may be padded
    if isinstance(tree, dict):
        return {key: full(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [full(value) for value in tree]
    return tree


def _like(saved: Tensor, live: Tensor) -> Tensor:
    if isinstance(live, DTensor) and saved.shape == live.shape:
        return distribute_tensor(saved.to(live.device), live.device_mesh, live.placements)
    return saved


@torch.no_grad()
def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a full state dict into a module whose parameters may be sharded."""
    live = module.state_dict()
    if live.keys() != state.keys():
        missing = sorted(live.keys() ^ state.keys())
        raise RunError(f"the checkpoint does not fit the model: {len(missing)} names differ, such as {missing[0]!r}")
    for name, tensor in live.items():
        tensor.copy_(_like(state[name], tensor))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a full optimizer state into an optimizer whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = _like(value, parameters[index])
    optimizer.load_state_dict(state)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Clip the norm of all gradients together, sharded or not; returns the norm before clipping."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, most)
    kinds = [kind for kind in (sharded, [p for p in parameters if not isinstance(p, DTensor)]) if kind]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack([full(norm) for norm in norms]))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


@contextmanager
def whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let sharded modules be called from outside their own forward, as an evaluation does."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
