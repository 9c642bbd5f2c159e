"""Low-rank adapters (LoRA: Hu et al., 2022, arXiv 2106.09685) by ``peft``, an optional extra."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.base.errors import ConfigError

# The layers of U-Nets and transformers of diffusers that DMD2's released adapters sit on.
LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
ADAPTER = "pytorch_lora_weights.safetensors"  # the name under which load_lora_weights of diffusers looks for it
PLACE = "unet"


def add_lora(
    net: nn.Module, *, rank: int, alpha: float, seed: int, layers: Sequence[str] = LAYERS, leave: str = ""
) -> nn.Module:
    """Put adapters into ``net``, in place; only they are trained from then on. At first they change nothing.

    Args:
        rank: of an adapter.
        layers: ends of the names of the modules that get one; where there is none, all linear ones do.
        leave: the name of a module that gets none: a language model's head.
        alpha: adapters count alpha / rank times.

    Raises:
        ConfigError: ``peft`` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("adapters need peft, which is not installed: pip install 'stillhouse[lora]'") from error
    wanted = [name for name, _ in net.named_modules() if any(name.endswith(f".{layer}") for layer in layers)]
    linear = ("Linear", "Conv1D")  # GPT-2's is a class of its own
    wanted = wanted or [name for name, part in net.named_modules() if type(part).__name__ in linear and name != leave]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted), net)
    return net


def has_lora(net: nn.Module) -> bool:
    """Whether `add_lora` put adapters into it."""
    return any(".lora_A." in name for name, _ in net.named_parameters())


def merged(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with its adapters added to the weights they sit on: a plain network again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            path, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(path), leaf, module.get_base_layer())
    del net.peft_config
    return net


def save_lora(net: nn.Module, folder: Path) -> None:
    """Write the adapters of ``net`` as ``load_lora_weights`` of a ``diffusers`` pipeline with a U-Net reads them.

    Their scale alpha / rank is multiplied in, so that no loader has to know it.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    scale = _scale(net)
    weights = {
        f"{PLACE}.{name}": (scale * weight if ".lora_B." in name else weight).detach().cpu().contiguous()
        for name, weight in get_peft_model_state_dict(net).items()
    }
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})


def load_lora(net: nn.Module, folder: Path) -> None:
    """Give ``net``, which has adapters, the weights that `save_lora` wrote."""
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    scale = _scale(net)
    weights = {
        name.removeprefix(f"{PLACE}."): weight / scale if ".lora_B." in name else weight
        for name, weight in load_file(folder / ADAPTER).items()
    }
    set_peft_model_state_dict(net, weights)


def _scale(net: Any) -> float:
    config = net.peft_config["default"]
    return config.lora_alpha / config.r


def save_merged_lm(model: Any, folder: Path) -> None:
    """Write a ``transformers`` model with adapters twice: as a plain model with the adapters added to its weights, and
    the adapters alone in ``folder/adapter``, as ``peft`` loads them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapters = {
        f"base_model.model.{name}": weight.detach().cpu().contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in tuned:
        module.merge()
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    model.save_pretrained(folder, state_dict=weights)
    for module in tuned:
        module.unmerge()
    (folder / "adapter").mkdir()
    model.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(adapters, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
