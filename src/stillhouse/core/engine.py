"""The engine: devices, precision, strategies and launch come from Lightning Fabric; here they are only configured."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.sharded import shard_blocks


@dataclass(kw_only=True)
class Engine:
    """Where and how a run computes: devices on each of so many nodes, and how their processes share the work."""

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    deepspeed: str | dict[str, Any] | None = None  # its configuration, or the path of one; None: ZeRO stage 2
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    shard: Callable[[nn.Module, Any], nn.Module] = shard_blocks

    def fabric(self) -> Fabric:
        """Start Fabric; with several devices the processes must have been started by a launcher."""
        world = self.devices * self.nodes
        if world > 1 and "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                f"devices={self.devices} needs {self.devices} processes: start this with "
                f"`stillhouse launch --devices {self.devices} ...` or torchrun"
            )
        strategy: Any = self.strategy
        if self.strategy == "ddp" or (self.strategy == "auto" and world > 1):
            strategy = DDPStrategy(find_unused_parameters=True)
        elif self.strategy == "fsdp2":
            strategy = ModelParallelStrategy(self.shard, data_parallel_size=world, tensor_parallel_size=1)
        try:
            if self.strategy == "deepspeed":
                strategy = DeepSpeedStrategy(config=self.deepspeed, stage=2)
                if strategy.zero_stage_3:
                    raise ValueError("DeepSpeed's ZeRO stage 3 splits the weights; use strategy=fsdp2 for that")
            fabric = Fabric(
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.nodes,
                strategy=strategy,
                precision=self.precision,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"cannot start the engine: {' '.join(str(error).split())}") from error
        fabric.launch()
        return fabric


def is_deepspeed(fabric: Fabric) -> bool:
    """Whether model and optimizer become one engine, which scales, clips, accumulates and steps by itself."""
    return isinstance(fabric.strategy, DeepSpeedStrategy)


def set_up_jointly(
    fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer, *, clip: float | None, accumulate: int
) -> tuple[Any, Any, Any]:
    """A model and its optimizer as one DeepSpeed engine: what to call, whose learning rate to set, what to step."""
    fabric.strategy.config |= {"gradient_clipping": clip or 0.0, "gradient_accumulation_steps": accumulate}
    wrapped, own = fabric.setup(module, optimizer)
    return wrapped, own.optimizer, fabric.strategy.model


def is_sharded(fabric: Fabric) -> bool:
    """Whether parameters are split over processes."""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def place(fabric: Fabric, module: nn.Module) -> nn.Module:
    """Bring a model that no player trains to the engine's device, precision and sharding."""
    if is_sharded(fabric):
        fabric.strategy.setup_module(fabric.strategy.precision.convert_module(module))
    else:
        fabric.strategy.precision.convert_module(module).to(fabric.device)
    return module


def average_gradients(fabric: Fabric, module: nn.Module) -> None:
    """Average the gradients of parameters that no wrapper synchronises: those of an objective."""
    if fabric.world_size > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad = fabric.all_reduce(parameter.grad, reduce_op="mean")
