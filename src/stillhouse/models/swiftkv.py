"""SwiftKV: the upper layers of a ``transformers`` decoder read keys and values made of one hidden state.

With x_j the input of layer j, L layers, and ``first`` = l: z = RMSNorm(x_l), K_j = z Wk_j and V_j = z Wv_j for j >= l
(SingleInputKV); ``group`` layers in a row share one pair (AcrossKV). A prompt token whose logits nobody asks for then
runs l layers and the key and value projections only (Qiao et al., 2024, arXiv 2410.03960).

`convert_swiftkv` puts the new projections beside the old ones, behind a switch: `original` is the model as it was, with
one copy of all that they share. ``save_pretrained`` writes the converted model alone, under a model type of its own
(``swiftkv-llama``); `load_swiftkv` reads it back. ``generate`` ends the forward of the prompt early and keeps one pair
of keys and values a group, whatever the architecture: queries, keys and positions stay the attention's own code.

Three kinds of attention can be converted. With ``q_proj``, ``k_proj`` and ``v_proj`` (Llama, Qwen2, Qwen3, Mistral),
each has a new one beside it. Where one projection gives all three (Phi-3, GPT-NeoX), it is cut into three new ones.
With latent attention (MLA: DeepSeek-V2 and V3), the compressed latent and the key's rotary part are made of z; the
projections from and to latents, with their norms, are the new parts.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError, one_line
from stillhouse.models.conversion import attention_paths
from stillhouse.models.own_types import base_type_in, causal_classes, load_saved, made_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "swiftkv-"
Role = Literal["query", "query norm", "key", "value", "key norm", "latent", "latent norm", "expanded", "fused"]
OF_THE_LAYER: tuple[Role, ...] = ("query", "query norm")
OF_Z: tuple[Role, ...] = ("key", "value", "latent")
SEPARATE: dict[str, Role] = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
FUSED = {"Phi3Attention": "qkv_proj", "GPTNeoXAttention": "query_key_value"}
LATENT: dict[str, Role] = {
    "q_proj": "query",
    "q_a_proj": "query",
    "q_a_layernorm": "query norm",
    "q_b_proj": "query",
    "kv_a_proj_with_mqa": "latent",
    "kv_a_layernorm": "latent norm",
    "kv_b_proj": "expanded",
}


class _Reached(Exception):
    """The prompt has got as far as it goes."""


class _Filled(Exception):
    """The keys and values of a layer are in the cache."""


class SingleInput(nn.Module):
    """z, what all keys and values from layer ``first`` on are made of, and the switch between the two models.

    Args:
        norm: the new norm.
        leaders: the first layer of each group; they belong to the model, not to this module.
    """

    def __init__(self, norm: nn.Module, leaders: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.norm = norm
        self.leaders = leaders
        self.on = True
        self.filling = False
        self.z: Tensor | None = None
        self.made: dict[tuple[Role, int], Tensor] = {}

    def enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with what enters layer ``first``; ends the forward there if it is to fill the cache only."""
        if not self.on:
            return
        self.z = self.norm(args[0] if args else kwargs["hidden_states"])
        if self.filling:
            for leader in self.leaders:
                with suppress(_Filled):
                    leader.forward(*args, **kwargs)
            raise _Reached

    def forget(self) -> None:
        """Let go of what a forward left."""
        self.z = None
        self.made.clear()


class Switched(nn.Module):
    """A projection of an upper layer's attention: its own, or SwiftKV's.

    Args:
        original: the model's own; None in a model that was saved without it.
        new: SwiftKV's; None for the keys and values of a layer that reads those of its group's first.
        shared: the model's `SingleInput`.
        role, group: what it projects, and for which group.
    """

    def __init__(
        self, original: nn.Module | None, new: nn.Module | None, shared: SingleInput, *, role: Role, group: int
    ) -> None:
        super().__init__()
        self.original, self.new = original, new
        self.role, self.group = role, group
        self._shared = (shared,)  # in a tuple: not a sub-module of this one

    def forward(self, x: Tensor) -> Tensor:
        shared = self._shared[0]
        if not shared.on:
            return _the_original(self.original)(x)
        if self.role in OF_THE_LAYER:
            assert self.new is not None
            if shared.filling:  # nobody asks for these tokens' own output
                return x.new_zeros(*x.shape[:-1], self.new.out_features) if isinstance(self.new, nn.Linear) else x
            return self.new(x)
        if self.new is not None:
            shared.made[self.role, self.group] = self.new(shared.z if self.role in OF_Z else x)
        return shared.made[self.role, self.group]


@dataclass(frozen=True)
class Layout:
    """How a fused projection lays out queries, keys and values.

    Attributes:
        sizes: features of each.
        heads: with so many heads, each has its query, key and value in a row (GPT-NeoX); with None, all queries come
            first, then all keys, then all values (Phi-3).
    """

    sizes: tuple[int, int, int]
    heads: int | None = None

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A weight or a bias (features, ...) as those of queries, keys and values."""
        if self.heads is None:
            return tensor.split(list(self.sizes))
        return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (self.heads, 3, -1)).unbind(1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Queries, keys and values (..., features) as the fused projection gives them."""
        if self.heads is None:
            return torch.cat(list(parts), -1)
        return torch.stack([part.unflatten(-1, (self.heads, -1)) for part in parts], -2).flatten(-3)


class SwitchedFused(nn.Module):
    """One projection for queries, keys and values: its own, or SwiftKV's, which are three.

    Args:
        original: the model's own; None in a model that was saved without it.
        new: ``query`` and, in the first layer of a group, ``key`` and ``value``.
        layout, shared, group: see `Layout` and `Switched`.
    """

    def __init__(
        self, original: nn.Module | None, new: nn.ModuleDict, shared: SingleInput, *, layout: Layout, group: int
    ) -> None:
        super().__init__()
        self.original, self.new = original, new
        self.layout, self.group = layout, group
        self._shared = (shared,)

    def forward(self, x: Tensor) -> Tensor:
        shared = self._shared[0]
        if not shared.on:
            return _the_original(self.original)(x)
        query = x.new_zeros(*x.shape[:-1], self.layout.sizes[0]) if shared.filling else self.new["query"](x)
        if "key" in self.new:
            shared.made["key", self.group] = self.new["key"](shared.z)
            shared.made["value", self.group] = self.new["value"](shared.z)
        return self.layout.join([query, shared.made["key", self.group], shared.made["value", self.group]])


def _the_original(module: nn.Module | None) -> nn.Module:
    if module is None:
        raise ModelError("this SwiftKV model was saved without the original; convert the original model again")
    return module


def convert_swiftkv(teacher: PreTrainedModel, *, first: int, group: int = 1) -> PreTrainedModel:
    """``teacher`` with SwiftKV beside it, behind a switch; only the new parts ask for gradients.

    All frozen weights are the teacher's tensors, not copies. Queries start as the layer's own, the norm as layer
    ``first``'s, the keys and values of a group as the mean of its layers'.

    Args:
        teacher: a causal language model of ``transformers`` of one of the kinds above.
        first: l, layers that keep their own keys and values: from 1 to all (then nothing changes).
        group: layers that share one pair; 1 gives each its own. The last group may be smaller.

    Raises:
        ModelError: an architecture that cannot be converted, or numbers that do not fit it.
    """
    kind = teacher.config.model_type
    if kind.startswith(PREFIX):
        raise ModelError("this model has been converted to SwiftKV already; convert the model it came from")
    paths = attention_paths(teacher)
    _check(teacher, paths, first, group)
    config_class, model_class = swiftkv_classes(kind)
    raw = {key: value for key, value in teacher.config.to_dict().items() if key not in ("model_type", "architectures")}
    swiftkv = {"first": first, "group": group, "original": True}
    with torch.device("meta"):
        student = model_class(config_class.from_dict({**raw, "swiftkv": swiftkv}))
    found = teacher.state_dict()
    names = [name for name in student.state_dict() if not _is_new(name)]
    carried = {name: found[name.replace(".original.", ".")] for name in names}
    student.load_state_dict({**carried, **_beginnings(teacher, paths, first, group)}, assign=True)
    student.tie_weights()
    for name, buffer in teacher.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(path), leaf, buffer)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    _check_runs(student)
    return freeze_original(student).eval()


def freeze_original(model: PreTrainedModel) -> PreTrainedModel:
    """Let only SwiftKV's own parts be trained: the norm, the queries, the keys and the values from ``first`` on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_new(name))
    return model


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """The model as it was before the surgery, in evaluation mode, while the context lasts."""
    shared: SingleInput = model.swiftkv  # type: ignore[assignment]
    training, on = [part for part in model.modules() if part.training], shared.on
    model.eval()
    shared.on = False
    try:
        yield
    finally:
        shared.on = on
        for part in training:
            part.training = True


def load_swiftkv(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The converted model that ``save_pretrained`` wrote into ``folder``, in eval mode, trainable where it was.

    Raises:
        ModelError: no such model there, or weights that do not fit its config.
    """
    base_type = base_type_in(folder, PREFIX)
    if base_type is None:
        raise ModelError(f"{folder}: no SwiftKV model in it; make one with convert_swiftkv and save_pretrained")
    _, model_class = swiftkv_classes(base_type)
    return freeze_original(load_saved(model_class, folder, dtype=dtype))


def is_swiftkv(folder: str | Path) -> bool:
    """Whether a directory holds a converted model."""
    return base_type_in(folder, PREFIX) is not None


@functools.cache
def swiftkv_classes(base_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config and model class of a converted ``base_type`` (``"llama"``), known to the Auto classes from now on."""
    from transformers import DynamicCache

    base_config: Any
    base_model: Any
    base_config, base_model = causal_classes(base_type)
    called = inspect.signature(base_model.forward)

    class Config(base_config):
        model_type = PREFIX + base_type

    class Model(base_model):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _put_swiftkv(self, config.swiftkv)

        @functools.wraps(base_model.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = dict(called.bind(self, *args, **kwargs).arguments)
            del given["self"]
            given |= given.pop("kwargs", {})
            try:
                if self.swiftkv.on and given.get("use_cache", self.config.use_cache) is not False:
                    given = _with_cache(self, given, DynamicCache)
                return super().forward(**given)
            finally:
                self.swiftkv.forget()

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            """Write the converted model, without the projections that only the original uses."""
            before, tensors = self.config.swiftkv, kwargs.pop("state_dict", None) or self.state_dict()
            kept = {name: tensor for name, tensor in tensors.items() if ".original." not in name}
            self.config.swiftkv = {**before, "original": False}
            try:
                return super().save_pretrained(save_directory, *args, state_dict=kept, **kwargs)
            finally:
                self.config.swiftkv = before

    return made_known(Config, Model, prefix="SwiftKV")


# -- the cache ------------------------------------------------------------------------------------------------------


@functools.cache
def _merged_cache() -> Any:
    from transformers import DynamicCache

    class MergedCache(DynamicCache):
        """One pair of keys and values a group of layers; the others of a group read the first one's."""

        def __init__(self, config: Any) -> None:
            super().__init__(config=config)
            self.first, self.group = config.swiftkv["first"], config.swiftkv["group"]
            self.filling = False
            self._latest: Any = None

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            leads = layer_idx < self.first or (layer_idx - self.first) % self.group == 0
            if leads:
                self._latest = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if self.filling and layer_idx >= self.first:
                raise _Filled
            return self._latest

    return MergedCache


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache of ``transformers``."""
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _with_cache(model: Any, given: dict[str, Any], plain: Any) -> dict[str, Any]:
    """The call with a merged cache in place of an empty plain one; a prompt is read into it, up to its last token."""
    cache, name = given.get("past_key_values"), "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
    empty = cache is None or (type(cache) is plain and cache.get_seq_length() == 0)
    if empty:
        cache = _merged_cache()(model.config)
    if not isinstance(cache, _merged_cache()):
        return given  # a cache of the user's own kind: every layer keeps its pair
    given = {**given, "past_key_values": cache, "use_cache": True}
    asked, length = given.get("logits_to_keep", 0), given[name].shape[1]
    inside = any(given.get(key) for key in ("output_hidden_states", "output_attentions", "labels"))
    if not (isinstance(asked, int) and asked == 1) or length == 1 or cache.get_seq_length() or inside:
        return given
    along = [key for key in (name, "position_ids", "cache_position") if isinstance(given.get(key), Tensor)]
    prompt = {**given, **{key: given[key][..., :-1] if key != "inputs_embeds" else given[key][:, :-1] for key in along}}
    if isinstance(given.get("attention_mask"), Tensor):
        if given["attention_mask"].ndim != 2:
            return given
        prompt["attention_mask"] = given["attention_mask"][:, :-1]
    else:
        prompt.pop("attention_mask", None)
    del prompt["logits_to_keep"]
    model.swiftkv.filling = cache.filling = True
    try:
        model.get_decoder()(**prompt)
    except _Reached:
        pass
    finally:
        model.swiftkv.filling = cache.filling = False
    return {**given, **{key: given[key][..., -1:] if key != "inputs_embeds" else given[key][:, -1:] for key in along}}


# -- what it saves --------------------------------------------------------------------------------------------------


def cache_share(layers: int, first: int, group: int) -> float:
    """Keys and values kept, of those of the original: (l + ceil((L - l) / g)) / L."""
    return (first + -(-(layers - first) // group)) / layers


@torch.no_grad()
def prefill_cost(model: Any, tokens: int) -> dict[str, int]:
    """``flops`` and ``cache_bytes`` of reading a prompt of so many tokens up to the next token's logits, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens, device=device) % vocabulary)[None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # fused attention on a CPU is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    return {"flops": int(counter.get_total_flops()), "cache_bytes": cache_bytes(output.past_key_values)}


# -- surgery --------------------------------------------------------------------------------------------------------


def _is_new(name: str) -> bool:
    return name.startswith("swiftkv.") or ".new." in name


def projections(attention: nn.Module, group: int) -> dict[str, Role]:
    """The parts of an attention that SwiftKV has new ones for, by name, and what each gives.

    Raises:
        ModelError: an attention of another kind.
    """
    parts = dict(attention.named_children())
    kind = type(attention).__name__
    if isinstance(parts.get(FUSED.get(kind, "")), nn.Linear):
        return {FUSED[kind]: "fused"}
    if "kv_a_proj_with_mqa" in parts and parts.keys() <= {*LATENT, "o_proj"}:
        return {name: role for name, role in LATENT.items() if name in parts}
    if all(isinstance(parts.get(name), nn.Linear) for name in SEPARATE):
        return {**SEPARATE, "k_norm": "key norm"} if group > 1 and "k_norm" in parts else dict(SEPARATE)
    raise ModelError(
        f"{kind} has none of the projections that SwiftKV can be put into; use a decoder with q_proj, k_proj and "
        "v_proj (Llama, Qwen2, Qwen3, Mistral), a Phi-3, a GPT-NeoX, a DeepSeek-V2 or a DeepSeek-V3"
    )


def _layout(attention: Any) -> Layout:
    fused = getattr(attention, FUSED[type(attention).__name__])
    if isinstance(fused, SwitchedFused):
        return fused.layout
    output = getattr(attention, "o_proj", None) or attention.dense
    query = output.in_features
    pair = (fused.out_features - query) // 2
    interleaved = type(attention).__name__ == "GPTNeoXAttention"
    return Layout((query, pair, pair), query // attention.head_size if interleaved else None)


def _check(model: Any, paths: list[str], first: int, group: int) -> None:
    count = len(paths)
    if not 1 <= first <= count or group < 1:
        raise ModelError(f"first={first}, group={group}: first must be from 1 to {count} layers, group at least 1")
    for path in paths[first:]:
        projections(model.get_submodule(path), group)
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    if len(set(kinds[first:])) > 1:
        raise ModelError(
            f"{type(model).__name__}: layers from {first} on are of different kinds ({', '.join(sorted(set(kinds)))}), "
            "and cannot read the same keys; choose a larger first"
        )


def _put_swiftkv(model: Any, swiftkv: Mapping[str, Any]) -> None:
    """Put the switch into a new model; its new weights are still to be filled."""
    first, group, keep = swiftkv["first"], swiftkv["group"], swiftkv["original"]
    paths = attention_paths(model)
    layers = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
    norm = copy.deepcopy(layers[min(first, len(layers) - 1)].input_layernorm)
    model.swiftkv = SingleInput(norm, tuple(layers[first::group]))
    for index in range(first, len(layers)):
        attention, number = model.get_submodule(paths[index]), (index - first) // group
        leads = (index - first) % group == 0
        for name, role in projections(attention, group).items():
            own = getattr(attention, name)
            kept = own if keep else None
            if role == "fused":
                layout = _layout(attention)
                roles = ("query", "key", "value") if leads else ("query",)
                new = nn.ModuleDict({part: _like(own, size) for part, size in zip(roles, layout.sizes, strict=False)})
                switched: nn.Module = SwitchedFused(kept, new, model.swiftkv, layout=layout, group=number)
            else:
                own_copy = copy.deepcopy(own) if role in OF_THE_LAYER or leads else None
                switched = Switched(kept, own_copy, model.swiftkv, role=role, group=number)
            setattr(attention, name, switched)
    if first < len(layers):
        layers[first].register_forward_pre_hook(model.swiftkv.enter, with_kwargs=True)


def _beginnings(teacher: Any, paths: list[str], first: int, group: int) -> dict[str, Tensor]:
    """What the new parts begin with, by name."""
    layers = [teacher.get_submodule(path.rpartition(".")[0]) for path in paths]
    norm = layers[min(first, len(layers) - 1)].input_layernorm
    found = {f"swiftkv.norm.{name}": tensor.clone() for name, tensor in norm.state_dict().items()}
    for start in range(first, len(paths), group):
        together = [teacher.get_submodule(path) for path in paths[start : start + group]]
        parts = [_parts(attention, group) for attention in together]
        for offset, own in enumerate(parts):
            for (name, role), state in own.items():
                if role in OF_THE_LAYER:
                    beginning = {part: tensor.clone() for part, tensor in state.items()}
                elif offset:
                    continue
                else:
                    alike = [other[name, role] for other in parts]
                    beginning = {part: torch.stack([one[part] for one in alike]).mean(0) for part in state}
                inner = f"{name}.new.{role}" if name in FUSED.values() else f"{name}.new"
                found |= {f"{paths[start + offset]}.{inner}.{part}": tensor for part, tensor in beginning.items()}
    return found


def _parts(attention: Any, group: int) -> dict[tuple[str, Role], dict[str, Tensor]]:
    """The tensors of an attention's projections by name and role, a fused one cut into three."""
    found: dict[tuple[str, Role], dict[str, Tensor]] = {}
    for name, role in projections(attention, group).items():
        state = getattr(attention, name).state_dict()
        if role != "fused":
            found[name, role] = state
            continue
        cut = {part: _layout(attention).split(tensor) for part, tensor in state.items()}
        roles: tuple[Role, ...] = ("query", "key", "value")
        for index, one in enumerate(roles):
            found[name, one] = {part: tensors[index] for part, tensors in cut.items()}
    return found


def _like(linear: nn.Linear, features: int) -> nn.Linear:
    """A linear map with the input, bias, type and device of another."""
    weight = linear.weight
    return nn.Linear(
        linear.in_features, features, bias=linear.bias is not None, device=weight.device, dtype=weight.dtype
    )


@torch.no_grad()
def _check_runs(model: Any) -> None:
    try:
        model.eval()(input_ids=torch.arange(3, device=model.get_input_embeddings().weight.device)[None], use_cache=True)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{type(model).__name__}: does not run with SwiftKV in it ({one_line(error)}); this kind is not supported"
        ) from error
