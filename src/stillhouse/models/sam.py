"""Segment-anything models of ``transformers``: loading, also pruned ones, and what in their encoder can be pruned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Observed, Signal
from stillhouse.models.errors import clear_errors, quiet
from stillhouse.models.pruning import Group, along, consumed, produced, set_head_dim, set_parameter

if TYPE_CHECKING:
    from transformers import SamConfig, SamModel


def new_sam(config: SamConfig, *, seed: int) -> SamModel:
    """A SAM with random weights, fixed by ``seed``."""
    from transformers import SamModel

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        return SamModel(config).eval()


def load_sam(name: str) -> SamModel:
    """Load a SAM from a directory or the hub, from safetensors only, in float32.

    Its vision encoder may have been pruned to widths that a ``SamConfig`` cannot say (layers of different widths, or
    attention narrower or wider than the residual stream): the saved weights decide then. ``SamModel.from_pretrained``
    itself loads those whose widths agree with their config.

    Raises:
        ModelError: not a SAM, or weights and config that do not fit otherwise.
    """
    from transformers import SamModel

    path = Path(name).expanduser()
    with clear_errors(name):
        model, report = SamModel.from_pretrained(
            path if path.is_dir() else name,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: not a SAM model, or not whole: {missing[0]} is missing; give a directory of SamModel"
        )
    other = sorted(key for key, *_ in report["mismatched_keys"])
    if other:
        _load_pruned(name, path, model, other)
    return model.eval()


def _load_pruned(name: str, folder: Path, model: SamModel, pruned: list[str]) -> None:
    from safetensors import safe_open

    strange = [key for key in pruned if not key.startswith("vision_encoder.")]
    if strange or not folder.is_dir():
        raise ModelError(
            f"{name}: weights and config.json do not fit: {(strange or pruned)[0]}; use the config these weights were "
            "saved with (a pruned model must be a local directory)"
        )
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in set(pruned) & set(opened.keys()):
                set_parameter(model, key, opened.get_tensor(key).float())
    for layer in model.vision_encoder.layers:
        set_head_dim(layer.attn, head_dim(layer.attn))


def head_dim(attention: nn.Module) -> int:
    """Channels of one head of a SAM vision attention."""
    qkv: Any = attention.qkv
    return int(qkv.out_features) // (3 * int(attention.num_attention_heads))  # type: ignore[arg-type]


def embedding_group(encoder: nn.Module) -> Group:
    """The residual stream of a SAM vision encoder: patch embedding, positions, blocks in and out, neck in."""
    config: Any = encoder.config
    heads, layers = config.num_attention_heads, len(encoder.layers)  # type: ignore[arg-type]
    members = produced(encoder, "patch_embed.projection")
    if encoder.pos_embed is not None:
        members += along(encoder, "pos_embed")
    for layer in (f"layers.{i}" for i in range(layers)):
        members += along(encoder, f"{layer}.layer_norm1") + along(encoder, f"{layer}.layer_norm2")
        members += consumed(f"{layer}.attn.qkv") + produced(encoder, f"{layer}.attn.proj")
        members += consumed(f"{layer}.mlp.lin1") + produced(encoder, f"{layer}.mlp.lin2")
    members += consumed("neck.conv1")
    channels = encoder.get_parameter("patch_embed.projection.weight").shape[0]
    return Group("embedding", channels, tuple(members), multiple=heads)


def head_dim_groups(encoder: nn.Module) -> list[Group]:
    """The head dimension of every block: query, key, value and output projection of all heads alike."""
    groups = []
    for i, layer in enumerate(encoder.layers):  # type: ignore[arg-type]
        path, heads = f"layers.{i}.attn", int(layer.attn.num_attention_heads)
        members = produced(encoder, f"{path}.qkv", repeat=3 * heads) + consumed(f"{path}.proj", repeat=heads)
        if layer.attn.use_rel_pos:
            members += along(encoder, f"{path}.rel_pos_h") + along(encoder, f"{path}.rel_pos_w")
        groups.append(Group(path, head_dim(layer.attn), tuple(members), attention=path))
    return groups


def mlp_groups(encoder: nn.Module) -> list[Group]:
    """The hidden units of every block's MLP."""
    config: Any = encoder.config
    groups = []
    for i, layer in enumerate(encoder.layers):  # type: ignore[arg-type]
        path = f"layers.{i}.mlp"
        members = (*produced(encoder, f"{path}.lin1"), *consumed(f"{path}.lin2"))
        groups.append(Group(path, layer.mlp.lin1.out_features, members, multiple=config.num_attention_heads))
    return groups


@torch.no_grad()
def reset_positions(encoder: nn.Module) -> None:
    """Set the relative position tables to zero, as a new SAM has them."""
    for layer in encoder.layers:  # type: ignore[union-attr]
        if layer.attn.use_rel_pos:
            layer.attn.rel_pos_h.zero_()
            layer.attn.rel_pos_w.zero_()


def fit_config(model: SamModel) -> None:
    """Let the config say the encoder's widths, as far as it can: the residual stream's, and the first MLP's."""
    encoder, config = model.vision_encoder, model.config.vision_config
    config.hidden_size = encoder.patch_embed.projection.out_channels
    config.mlp_dim = encoder.layers[0].mlp.lin1.out_features
    encoder.config.hidden_size, encoder.config.mlp_dim = config.hidden_size, config.mlp_dim


@torch.no_grad()
def renew(encoder: nn.Module) -> None:
    """New weights for every module of a vision encoder: Xavier-uniform matrices, neutral norms, tables at zero."""
    for name, parameter in encoder.named_parameters():
        layer = encoder.get_submodule(name.rpartition(".")[0])
        if parameter.ndim > 1 and isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(parameter)
        else:
            parameter.fill_(1.0 if isinstance(layer, nn.LayerNorm) and name.endswith("weight") else 0.0)


# -- what an observed encoder is listened to by -----------------------------------------------------------------------


def image_embedding(encoder: Observed) -> Signal:
    """The image embedding (B, C, h, w)."""
    return encoder.output("last_hidden_state")


def qkv_taps(encoder: Observed) -> dict[str, list[Signal]]:
    """Queries, keys and values of the ``windowed`` and of the ``global`` blocks, where there are such."""
    taps: dict[str, list[Signal]] = {}
    for i, layer in enumerate(encoder.module.layers):  # type: ignore[arg-type]
        taps.setdefault("windowed" if layer.window_size else "global", []).append(encoder.tap(f"layers.{i}.attn.qkv"))
    return taps


def mlp_taps(encoder: Observed) -> list[Signal]:
    """The hidden activations of every block's MLP."""
    return [encoder.tap(f"layers.{i}.mlp.lin2", of="input") for i in range(len(encoder.module.layers))]  # type: ignore[arg-type]


def residual_taps(encoder: Observed) -> list[Signal]:
    """The residual stream before the blocks, and in each block after the attention and after the MLP."""
    taps = [encoder.tap("layers.0", of="input")]
    for i in range(len(encoder.module.layers)):  # type: ignore[arg-type]
        taps += [encoder.tap(f"layers.{i}.layer_norm2", of="input"), encoder.tap(f"layers.{i}")]
    return taps
