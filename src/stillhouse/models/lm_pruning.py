"""Structured pruning of language models: heads, feed-forward neurons, hidden dimensions and layers leave.

For models built as Llama is (Mistral, Qwen, Granite), as GPT-2 and as GPT-NeoX (Pythia). What parts are worth is the
first-order effect of a mask m = 1 on each of them (|dL/dm|, as in Michel et al., 2019, arXiv 1905.10650). Suffixes:
B batch, T tokens, D hidden dimensions, H heads, L layers, I neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.models.depth import with_layers
from stillhouse.models.pruning import Group, Member, along, consumed, produced, prune
from stillhouse.models.scaling import config_parameters, new_causal_lm, scaled_config, student_from_spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Unit = Literal["heads", "groups", "neurons"]


class Makes(NamedTuple):
    """A projection that makes heads or key-value heads (``groups``).

    ``each``: sizes of a head that lie together for one of them (GPT-NeoX has query, key and value of a head in a row);
    ``repeat``: how often all of them follow one another (GPT-2 has all queries, then all keys, then all values).
    """

    path: str
    unit: Unit = "heads"
    each: int = 1
    repeat: int = 1


@dataclass(frozen=True)
class Layout:
    """Where models of one build have their parts; paths inside a layer are relative to it.

    Attributes:
        decoder: path of the module with the layers.
        embeddings: what writes to the hidden dimensions before the first layer.
        norm: the norm after the last layer.
        makes: projections that make the heads; ``attended`` reads them.
        inner: projections that make the neurons; ``written`` reads them.
    """

    decoder: str
    embeddings: tuple[str, ...]
    layers: str
    norm: str
    makes: tuple[Makes, ...]
    attended: str
    inner: tuple[str, ...]
    written: str


LAYOUTS = (
    Layout(
        "model",
        ("embed_tokens",),
        "layers",
        "norm",
        (Makes("self_attn.q_proj"), Makes("self_attn.k_proj", "groups"), Makes("self_attn.v_proj", "groups")),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
    ),
    Layout(
        "transformer",
        ("wte", "wpe"),
        "h",
        "ln_f",
        (Makes("attn.c_attn", repeat=3),),
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
    ),
    Layout(
        "gpt_neox",
        ("embed_in",),
        "layers",
        "final_layer_norm",
        (Makes("attention.query_key_value", each=3),),
        "attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
    ),
)


def layout_of(model: Any) -> Layout:
    """Where the parts of a causal language model are.

    Raises:
        ModelError: it is built otherwise.
    """
    modules = dict(model.named_modules())
    for layout in LAYOUTS:
        paths = [one.path for one in layout.makes] + [layout.attended, *layout.inner, layout.written]
        layers: Any = modules.get(f"{layout.decoder}.{layout.layers}", ())
        inside = [dict(layer.named_modules()) for layer in layers]
        if inside and all(_matrix(found.get(path)) for found in inside for path in paths):
            return layout
    raise ModelError(
        f"{type(model).__name__}: pruning needs a model built as Llama is (self_attn.q_proj, mlp.gate_proj, ...), as "
        "GPT-2 or as GPT-NeoX; convert it, or use another teacher"
    )


def layers_of(model: Any) -> tuple[Layout, Any]:
    """The layout of a model and its layers."""
    layout = layout_of(model)
    return layout, model.get_submodule(f"{layout.decoder}.{layout.layers}")


def _conv1d(module: Any) -> bool:
    """Whether a module is the linear layer of GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def _matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear) or _conv1d(module)


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of one head, which pruning leaves as they are."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def sizes_of(config: PretrainedConfig) -> dict[str, int]:
    """Layers, hidden dimensions, heads, key-value heads and neurons of a model of ``config``."""
    heads, width = config.num_attention_heads, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": inner,
    }


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
    (layout, layers), size = layers_of(model), head_size(model.config)
    decoder = model.get_submodule(layout.decoder)

    def before(mask: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        return lambda _module, args: (args[0] * mask, *args[1:])

    def after(mask: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _args, output: output * mask

    hooks = [decoder.get_submodule(path).register_forward_hook(after(masks.hidden)) for path in layout.embeddings]
    for number, layer in enumerate(layers):
        heads = masks.heads[number].repeat_interleave(size)
        written = masks.hidden * masks.layers[number]
        for path, mask in ((layout.attended, heads), (layout.written, masks.neurons[number])):
            module = layer.get_submodule(path)
            hooks += [module.register_forward_pre_hook(before(mask)), module.register_forward_hook(after(written))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ones(model: PreTrainedModel) -> MaskScores:
    """Masks that change nothing."""
    layout_of(model)
    sizes, weight = sizes_of(model.config), model.get_input_embeddings().weight
    layers = sizes["num_hidden_layers"]
    shapes = (
        (layers, sizes["num_attention_heads"]),
        (layers, sizes["intermediate_size"]),
        (sizes["hidden_size"],),
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
    sizes, wanted = sizes_of(config), sizes_of(target)
    for name, size in sizes.items():
        if wanted[name] > size:
            raise ModelError(f"pruning: {name}={wanted[name]} is more than the teacher's {size}")
    size = head_size(config)
    if head_size(target) != size:
        free = getattr(config, "head_dim", None) is not None
        raise ModelError(
            f"pruning: heads of {head_size(target)} dimensions cannot be cut out of heads of {size}; give "
            + (f"head_dim={size}" if free else f"hidden_size = heads x {size}")
        )
    groups, kept_groups = sizes["num_key_value_heads"], wanted["num_key_value_heads"]
    each, kept_each = sizes["num_attention_heads"] // groups, wanted["num_attention_heads"] // kept_groups
    if kept_each > each:
        raise ModelError(f"pruning: {kept_each} heads per key-value head are more than the teacher's {each}")
    found = scores.normalised()
    layers = best(scores.layers, target.num_hidden_layers)
    heads, chosen, neurons = [], [], []
    for layer in layers.tolist():
        by_group = found.heads[layer].view(groups, each)
        chosen.append(best(by_group.topk(kept_each).values.sum(1), kept_groups))
        heads.append(torch.cat([best(by_group[g], kept_each) + g * each for g in chosen[-1].tolist()]))
        neurons.append(best(found.neurons[layer], wanted["intermediate_size"]))
    return Kept(layers, best(found.hidden, target.hidden_size), tuple(heads), tuple(chosen), tuple(neurons))


def target_config(config: PretrainedConfig, size: int | str) -> PretrainedConfig:
    """The shape that a model of ``config`` is pruned to: so many parameters at most, or a line of sizes.

    The size of a head stays: where a config does not have it (GPT-2, GPT-NeoX), hidden dimensions leave with whole
    heads. See `stillhouse.models.causal_lm.student_from_spec` for the line.
    """
    if hasattr(config, "n_inner"):  # None there means four times the width, of which the neurons kept need be none
        config = copy.deepcopy(config)
        config.n_inner = sizes_of(config)["intermediate_size"]
    free = getattr(config, "head_dim", None) is not None
    same = {"head_dim": head_size(config)} if free else {}
    if isinstance(size, int):
        return scaled_config(config, ratio=size / config_parameters(config), whole_heads=not free, **same)
    extra = "".join(f",{name}={value}" for name, value in same.items() if name not in size)
    return student_from_spec(size + extra, config)


# -- cutting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A group whose channels are ``each`` in a row for every head, key-value head or neuron."""

    unit: Unit
    group: Group
    each: int = 1


def groups_of(model: PreTrainedModel) -> tuple[Group, list[list[Cut]]]:
    """(hidden dimensions; for each layer its heads, key-value heads and neurons)."""
    layout, blocks = layers_of(model)
    config, head_dim, sizes = model.config, head_size(model.config), sizes_of(model.config)
    many = {"heads": sizes["num_attention_heads"], "groups": sizes["num_key_value_heads"]}
    hidden = [Member(f"{layout.decoder}.{path}.weight", 1) for path in layout.embeddings]
    if not config.tie_word_embeddings:
        hidden += consumed(_output_path(model))
    layers = []
    for number, layer in enumerate(blocks):
        path = f"{layout.decoder}.{layout.layers}.{number}"
        attended, written = f"{path}.{layout.attended}", f"{path}.{layout.written}"
        inner = [f"{path}.{name}" for name in layout.inner]
        for reads in (*(f"{path}.{one.path}" for one in layout.makes), *inner):
            hidden += _oriented(model, reads, consumed(reads))
        for writes in (attended, written):
            hidden += _oriented(model, writes, produced(model, writes))
        for name, module in layer.named_children():
            if "norm" in name or isinstance(module, nn.LayerNorm):
                hidden += along(model, f"{path}.{name}")
        cuts = [
            Cut(
                one.unit,
                Group(
                    f"{path}.{one.path}",
                    many[one.unit] * one.each * head_dim,
                    tuple(
                        _oriented(model, f"{path}.{one.path}", produced(model, f"{path}.{one.path}", repeat=one.repeat))
                    ),
                ),
                one.each * head_dim,
            )
            for one in layout.makes
        ]
        heads = Group(f"{path}.heads", many["heads"] * head_dim, tuple(_oriented(model, attended, consumed(attended))))
        members = [member for name in inner for member in _oriented(model, name, produced(model, name))]
        members += _oriented(model, written, consumed(written))
        neurons = Group(f"{path}.neurons", sizes["intermediate_size"], tuple(members))
        layers.append([*cuts, Cut("heads", heads, head_dim), Cut("neurons", neurons)])
    hidden += along(model, f"{layout.decoder}.{layout.norm}")
    return Group("hidden", config.hidden_size, tuple(hidden)), layers


def prune_causal_lm(model: PreTrainedModel, target: PretrainedConfig, kept: Kept) -> PreTrainedModel:
    """A new model of the shape ``target``, with the weights of what is kept; ``model`` stays as it is."""
    small = with_layers(model, kept.layers.tolist())
    hidden, layers = groups_of(small)
    prune(small, hidden, kept.hidden)
    for number, cuts in enumerate(layers):
        for cut in cuts:
            prune(small, cut.group, _dims(getattr(kept, cut.unit)[number], cut.each))
    state = small.state_dict()
    output = f"{_output_path(model)}.weight"
    if target.tie_word_embeddings:
        state.pop(output, None)
    made = new_causal_lm(target, seed=0, dtype=model.get_input_embeddings().weight.dtype)
    missing = made.load_state_dict(state, strict=False)
    wrong: Sequence[str] = [*missing.unexpected_keys, *(key for key in missing.missing_keys if key != output)]
    if wrong:
        raise ModelError(f"{type(model).__name__}: pruning does not know {wrong[0]} ({len(wrong)} tensors in all)")
    return made.eval()


def _output_path(model: PreTrainedModel) -> str:
    """The path of the output layer."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _oriented(model: PreTrainedModel, path: str, members: list[Member]) -> list[Member]:
    """Members of the layer at ``path``, with its weight the other way round where it is GPT-2's."""
    if not _conv1d(model.get_submodule(path)):
        return members
    return [replace(one, dim=1 - one.dim) if one.parameter == f"{path}.weight" else one for one in members]


def _dims(units: Tensor, size: int) -> Tensor:
    """The dimensions of whole units of ``size`` each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
