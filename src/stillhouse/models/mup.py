"""Language models whose best learning rate does not move with width and depth, and experts grown out of them.

MiniCPM's scaling (Hu et al., 2024, arXiv 2404.06395, after Yang et al., 2022, arXiv 2203.03466) in the form of
``transformers``' Granite, which has the same four factors: what follows is plain Granite to everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.core.player import OptimizerFactory
from stillhouse.models.lm_pruning import head_size
from stillhouse.models.scaling import new_causal_lm

if TYPE_CHECKING:
    from transformers import GraniteConfig, GraniteForCausalLM, GraniteMoeForCausalLM, PretrainedConfig


def mup_config(
    config: PretrainedConfig, *, base_width: int = 256, scale_emb: float = 12.0, scale_depth: float = 1.4
) -> GraniteConfig:
    """A Llama-like config with MiniCPM's factors.

    Embeddings x ``scale_emb``, residual branches x ``scale_depth`` / sqrt(layers), logits / (width / base_width);
    attention logits are scaled as usual.
    """
    from transformers import GraniteConfig

    heads = config.num_attention_heads
    if head_size(config) * heads != config.hidden_size:
        raise ModelError(
            f"head_dim={head_size(config)}: Granite needs hidden_size / heads = {config.hidden_size / heads:g}"
        )
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    )
    return GraniteConfig(
        **{name: getattr(config, name) for name in copied},
        embedding_multiplier=scale_emb,
        residual_multiplier=scale_depth / math.sqrt(config.num_hidden_layers),
        logits_scaling=config.hidden_size / base_width,
        attention_multiplier=head_size(config) ** -0.5,
    )


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights both of whose dimensions grow with the width: the matrices inside the layers, but for routers."""
    layers: Any = model.get_submodule("model.layers")
    return [p for name, p in layers.named_parameters() if p.ndim >= 2 and ".router." not in name]


def new_mup_lm(config: GraniteConfig, *, seed: int, init_std: float = 0.1) -> GraniteForCausalLM:
    """A model with MiniCPM's initial weights: std ``init_std`` / sqrt(width ratio) inside, ``init_std`` elsewhere."""
    model: Any = new_causal_lm(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    inside = {id(parameter) for parameter in hidden_matrices(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                std = init_std / math.sqrt(config.logits_scaling) if id(parameter) in inside else init_std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def mup_adamw(
    model: nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    eps: float = 1e-8,
) -> OptimizerFactory:
    """AdamW in which hidden matrices learn with ``lr`` / (width ratio), everything else with ``lr``.

    Norms and biases are not decayed. A model without a width ratio (any but Granite) has 1.
    """
    ratio = float(getattr(model.config, "logits_scaling", 1.0) or 1.0)
    inside = {id(parameter) for parameter in hidden_matrices(model)} if ratio != 1 else set()

    def build(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        given = [parameter for group in groups for parameter in group["params"]]
        hidden = [p for p in given if id(p) in inside]
        tables = [p for p in given if id(p) not in inside and p.ndim >= 2]
        split = [
            {"params": tables, "weight_decay": weight_decay},
            {"params": hidden, "weight_decay": weight_decay, "lr": lr / ratio},
            {"params": [p for p in given if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in split if group["params"]], lr=lr, betas=betas, eps=eps)

    return build


# -- mixture of experts ---------------------------------------------------------------------------------------------


def upcycled(
    model: Any, *, experts: int = 8, active: int = 2, router_std: float = 0.01, seed: int = 0
) -> GraniteMoeForCausalLM:
    """Sparse upcycling (Komatsuzaki et al., 2023, arXiv 2212.05055): every feed-forward network becomes ``experts``
    copies of itself, of which a random router N(0, ``router_std``) mixes ``active``; at first that changes nothing.

    Raises:
        ModelError: not a Granite model, or more active experts than there are.
    """
    from transformers import GraniteMoeConfig

    if model.config.model_type != "granite":
        raise ModelError(f"{type(model).__name__} cannot be upcycled; train one of MiniCPM's shape, which is Granite's")
    if not 1 <= active <= experts:
        raise ModelError(f"active={active}: must be between 1 and experts={experts}")
    known = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "mlp_bias")}
    config = GraniteMoeConfig(**known, num_local_experts=experts, num_experts_per_tok=active)
    made: Any = new_causal_lm(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = dict(model.state_dict())
    for number in range(config.num_hidden_layers):
        path, moe = f"model.layers.{number}.mlp", f"model.layers.{number}.block_sparse_moe"
        gate, up, down = (state.pop(f"{path}.{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{moe}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(experts, -1, -1).clone()
        state[f"{moe}.experts.down_proj"] = down.expand(experts, -1, -1).clone()
        state[f"{moe}.router.weight"] = torch.randn(experts, config.hidden_size, generator=generator) * router_std
    made.load_state_dict(state)
    return made.eval()


def router_paths(model: Any) -> list[str]:
    """The paths of the routers of an upcycled model, whose first output are the logits (tokens, experts)."""
    return [name for name, _ in model.named_modules() if name.endswith("block_sparse_moe.router")]
