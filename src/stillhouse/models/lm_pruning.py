"""Structured pruning of Llama-like language models: heads, feed-forward neurons, hidden dimensions and layers leave.

What they are worth is the first-order effect of a mask m = 1 on each of them (|dL/dm|, as in Michel et al., 2019, arXiv
1905.10650). Suffixes: B batch, T tokens, D hidden dimensions, H heads, L layers, I neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.models.depth import with_layers
from stillhouse.models.pruning import Group, Member, along, consumed, produced, prune
from stillhouse.models.scaling import config_parameters, new_causal_lm, scaled_config, student_from_spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def decoder_of(model: Any) -> Any:
    """The decoder inside a causal language model whose parts are named as Llama's (Mistral's, Qwen's, Granite's).

    Raises:
        ModelError: parts have other names (GPT-2 and GPT-NeoX fuse them).
    """
    decoder = getattr(model, "model", None)
    for layer in getattr(decoder, "layers", [None]):
        attention, feed_forward = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        named = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ATTENTION)
        if not named or not all(isinstance(getattr(feed_forward, name, None), nn.Linear) for name in FEED_FORWARD):
            raise ModelError(
                f"{type(model).__name__}: pruning needs a model built as Llama is (self_attn.q_proj, mlp.gate_proj, "
                "...); convert it, or use another teacher"
            )
    return decoder


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of one head, which pruning leaves as they are."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class MaskScores:
    """|dL/dm| by part: ``heads`` (L, H), ``neurons`` (L, I), ``hidden`` (D), ``layers`` (L)."""

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    layers: Tensor

    def normalised(self) -> MaskScores:
        """Heads and neurons over the L2 norm of their layer's scores, so that layers compare."""

        def over_norm(scores: Tensor) -> Tensor:
            return scores / (scores.norm(dim=-1, keepdim=True) + 1e-17)

        return MaskScores(over_norm(self.heads), over_norm(self.neurons), over_norm(self.hidden), self.layers)


@contextmanager
def masked(model: PreTrainedModel, masks: MaskScores) -> Iterator[None]:
    """Multiply heads, neurons, hidden dimensions (wherever they are written) and layers' outputs by ``masks``."""
    decoder, size = decoder_of(model), head_size(model.config)

    def before(mask: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        return lambda _module, args: (args[0] * mask, *args[1:])

    def after(mask: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _args, output: output * mask

    hooks = [decoder.embed_tokens.register_forward_hook(after(masks.hidden))]
    for number, layer in enumerate(decoder.layers):
        heads = masks.heads[number].repeat_interleave(size)
        written = masks.hidden * masks.layers[number]
        for module, mask in ((layer.self_attn.o_proj, heads), (layer.mlp.down_proj, masks.neurons[number])):
            hooks += [module.register_forward_pre_hook(before(mask)), module.register_forward_hook(after(written))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ones(model: PreTrainedModel) -> MaskScores:
    """Masks that change nothing."""
    config, weight = model.config, decoder_of(model).embed_tokens.weight
    layers = config.num_hidden_layers
    shapes = (
        (layers, config.num_attention_heads),
        (layers, config.intermediate_size),
        (config.hidden_size,),
        (layers,),
    )
    return MaskScores(*(torch.ones(shape, device=weight.device, dtype=weight.dtype) for shape in shapes))


def mask_scores(
    model: PreTrainedModel, loss: Callable[[Any], Tensor], batches: Iterable[Any], *, most: int | None = None
) -> MaskScores:
    """The mean over ``batches`` of |dL/dm|, m = 1 on every head, neuron, hidden dimension and layer.

    Args:
        loss: batch -> scalar, by a forward of ``model`` (in evaluation mode, as a rule).
    """
    total: list[Tensor] | None = None
    count = 0
    for batch in batches:
        masks = ones(model)
        parts = [part.requires_grad_() for part in (masks.heads, masks.neurons, masks.hidden, masks.layers)]
        with masked(model, masks):
            gradients = [gradient.abs() for gradient in torch.autograd.grad(loss(batch), parts)]
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        count += 1
        if count == most:
            break
    if total is None:
        raise ModelError("no batch to score the parts of the teacher with; give calibration text")
    return MaskScores(*(part / count for part in total))


# -- what is kept ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Indices that stay, ascending: ``layers``, ``hidden``, and for each kept layer ``heads``, ``groups``, ``neurons``.

    ``groups`` are key-value heads.
    """

    layers: Tensor
    hidden: Tensor
    heads: tuple[Tensor, ...]
    groups: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending."""
    return scores.topk(count).indices.sort().values


def choose(scores: MaskScores, config: PretrainedConfig, target: PretrainedConfig) -> Kept:
    """The best parts of a model of ``config`` that make one of the shape of ``target``.

    Key-value heads stay with the best of the heads that read them.

    Raises:
        ModelError: a part of ``target`` is larger than the model has, or its heads are of another size.
    """
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in sizes:
        if getattr(target, name) > getattr(config, name):
            raise ModelError(
                f"pruning: {name}={getattr(target, name)} is more than the teacher's {getattr(config, name)}"
            )
    if head_size(target) != head_size(config):
        raise ModelError(
            f"pruning: heads of {head_size(target)} dimensions cannot be cut out of heads of {head_size(config)}; "
            f"give head_dim={head_size(config)}"
        )
    groups, kept_groups = config.num_key_value_heads, target.num_key_value_heads
    each, kept_each = config.num_attention_heads // groups, target.num_attention_heads // kept_groups
    if kept_each > each:
        raise ModelError(f"pruning: {kept_each} heads per key-value head are more than the teacher's {each}")
    found = scores.normalised()
    layers = best(scores.layers, target.num_hidden_layers)
    heads, chosen, neurons = [], [], []
    for layer in layers.tolist():
        by_group = found.heads[layer].view(groups, each)
        chosen.append(best(by_group.topk(kept_each).values.sum(1), kept_groups))
        heads.append(torch.cat([best(by_group[g], kept_each) + g * each for g in chosen[-1].tolist()]))
        neurons.append(best(found.neurons[layer], target.intermediate_size))
    return Kept(layers, best(found.hidden, target.hidden_size), tuple(heads), tuple(chosen), tuple(neurons))


def target_config(config: PretrainedConfig, size: int | str) -> PretrainedConfig:
    """The shape that a model of ``config`` is pruned to: so many parameters at most, or a line of sizes.

    The size of a head stays. See `stillhouse.models.causal_lm.student_from_spec` for the line.
    """
    same = {"head_dim": head_size(config)} if getattr(config, "head_dim", None) is not None else {}
    if isinstance(size, int):
        return scaled_config(config, ratio=size / config_parameters(config), **same)
    extra = "".join(f",{name}={value}" for name, value in same.items() if name not in size)
    return student_from_spec(size + extra, config)


# -- cutting --------------------------------------------------------------------------------------------------------


def groups_of(model: PreTrainedModel) -> tuple[Group, list[tuple[Group, Group, Group]]]:
    """(hidden dimensions, for each layer its heads, key-value heads and neurons); heads by their dimensions."""
    size, config = head_size(model.config), model.config
    hidden: list[Member] = [Member("model.embed_tokens.weight", 1)]
    if not config.tie_word_embeddings:
        hidden += consumed("lm_head")
    layers = []
    for number, layer in enumerate(decoder_of(model).layers):
        path = f"model.layers.{number}"
        q, k, v, o = (f"{path}.self_attn.{name}" for name in ATTENTION)
        gate, up, down = (f"{path}.mlp.{name}" for name in FEED_FORWARD)
        for reads in (q, k, v, gate, up):
            hidden += consumed(reads)
        hidden += produced(model, o) + produced(model, down)
        for name, _ in layer.named_children():
            if "norm" in name:
                hidden += along(model, f"{path}.{name}")
        heads = (*produced(model, q), *consumed(o))
        pairs = (*produced(model, k), *produced(model, v))
        neurons = (*produced(model, gate), *produced(model, up), *consumed(down))
        layers.append(
            (
                Group(f"{path}.heads", config.num_attention_heads * size, heads),
                Group(f"{path}.groups", config.num_key_value_heads * size, pairs),
                Group(f"{path}.neurons", config.intermediate_size, neurons),
            )
        )
    hidden += along(model, "model.norm")
    return Group("hidden", config.hidden_size, tuple(hidden)), layers


def prune_causal_lm(model: PreTrainedModel, target: PretrainedConfig, kept: Kept) -> PreTrainedModel:
    """A new model of the shape ``target``, with the weights of what is kept; ``model`` stays as it is."""
    small = with_layers(model, kept.layers.tolist())
    size = head_size(model.config)
    hidden, layers = groups_of(small)
    prune(small, hidden, kept.hidden)
    for groups, heads, pairs, neurons in zip(layers, kept.heads, kept.groups, kept.neurons, strict=True):
        for group, keep in zip(groups, (_dims(heads, size), _dims(pairs, size), neurons), strict=True):
            prune(small, group, keep)
    state = small.state_dict()
    if target.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    made = new_causal_lm(target, seed=0, dtype=decoder_of(model).embed_tokens.weight.dtype)
    missing = made.load_state_dict(state, strict=False)
    wrong: Sequence[str] = [*missing.unexpected_keys, *(key for key in missing.missing_keys if key != "lm_head.weight")]
    if wrong:
        raise ModelError(f"{type(model).__name__}: pruning does not know {wrong[0]} ({len(wrong)} tensors in all)")
    return made.eval()


def _dims(heads: Tensor, size: int) -> Tensor:
    """The dimensions of whole heads."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()
