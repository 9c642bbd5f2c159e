"""Attention becomes state space: any ``transformers`` decoder with mixers in place of its attention modules.

`convert` makes the model, with everything but attention carried over. ``save_pretrained`` writes it under a model
type of its own (``stillhouse-llama`` for a Llama), so that nothing takes it for the model it came from and fills the
missing attention with random numbers. `load_converted` reads it back. After `register_converted` in the same process,
``AutoModelForCausalLM`` does so too; no code that comes with a model is run either way.

``generate`` works as usual, token by token: in place of keys and values each mixer keeps a state of constant size
(`stillhouse.models.state_cache`). Where an architecture hands its layers no cache, config and generation config say
``use_cache=False``, and the whole text is read again at each token.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.models.own_types import base_type_in, causal_classes, load_saved, made_known
from stillhouse.models.state_space import StateSpaceMixer, inherit_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "stillhouse-"
Inherit = Literal["none", "values", "all"]
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": ("o_proj", "out_proj", "dense")}


def attention_paths(model: nn.Module) -> list[str]:
    """The path of the attention module of every decoder layer, first layer first.

    Raises:
        ModelError: no list of layers that have one attention module each.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[operator, union-attr]
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            found = [
                f"{path}.{index}.{name}"
                for index, layer in enumerate(layers)
                for name, child in layer.named_children()
                if type(child).__name__.endswith("Attention") or isinstance(child, StateSpaceMixer)
            ]
            if len(found) == count:
                return found
    raise ModelError(
        f"{type(model).__name__} has no list of {count} layers with one attention module each, so its attention cannot "
        "be replaced; use a decoder such as a Llama, Qwen2 or Phi"
    )


def convert(
    teacher: PreTrainedModel,
    *,
    attention_layers: Sequence[int] = (),
    state_size: int = 64,
    conv_width: int = 4,
    inherit: Inherit = "none",
    chunk: int = 64,
) -> PreTrainedModel:
    """A copy of ``teacher`` whose attention modules are `StateSpaceMixer`.

    Args:
        teacher: a causal language model of ``transformers``.
        attention_layers: layers that keep their attention, counted from 0 (-1 is the last): a hybrid.
        state_size, conv_width, chunk: see `StateSpaceMixer`; heads and their width are the attention's.
        inherit: what the mixers get from the attention: ``"none"`` (random), ``"values"`` (W_V and W_O) or ``"all"``
            (W_Q and W_K as well; ``state_size`` is then the attention's head size).

    Raises:
        ModelError: an architecture that cannot be converted, or a layer that does not exist.
    """
    config = teacher.config
    if config.model_type.startswith(PREFIX):
        raise ModelError("this model's attention has been replaced already; convert the model it came from")
    paths = attention_paths(teacher)
    kept = {index % len(paths) for index in attention_layers if -len(paths) <= index < len(paths)}
    if len(kept) < len(attention_layers) or len(kept) == len(paths):
        raise ModelError(
            f"attention_layers={list(attention_layers)}: must be different layers from 0 to {len(paths) - 1}, not all"
        )
    modules = dict(teacher.named_modules())
    layers = [index for index in range(len(paths)) if index not in kept]
    first = modules[paths[layers[0]]]
    sizes = {"state_size": state_size, "conv_width": conv_width, "chunk": chunk, "bias": _has_bias(first)}
    config_class, model_class = converted_classes(config.model_type)
    raw = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    student = model_class(config_class.from_dict({**raw, "mixers": {"layers": layers, **sizes}}))
    student = student.to(teacher.dtype)
    replaced = tuple(f"{paths[index]}." for index in layers)
    carried = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(replaced)}
    missing, _ = student.load_state_dict(carried, strict=False)
    strange = [name for name in missing if not name.startswith(replaced)]
    if strange:
        raise ModelError(f"{type(teacher).__name__}: {strange[0]} cannot be carried over; this model is not supported")
    if inherit != "none":
        for index in layers:
            found = _projections(modules[paths[index]], inherit)
            inherit_attention(student.get_submodule(paths[index]), **found)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    _check_runs(student)
    if not _keeps_states(student):
        student.config.use_cache = student.generation_config.use_cache = False
    return student.eval()


def load_converted(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The converted model that ``save_pretrained`` wrote into ``folder``, in eval mode.

    Raises:
        ModelError: no converted model there, or weights that do not fit its config.
    """
    _, model_class = register_converted(folder)
    return load_saved(model_class, folder, dtype=dtype)


def is_converted(folder: str | Path) -> bool:
    """Whether a directory holds a converted model."""
    return base_type_in(folder, PREFIX) is not None


def register_converted(folder: str | Path) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Make ``AutoModelForCausalLM`` load the converted model in ``folder``, in this process; returns its classes."""
    base_type = base_type_in(folder, PREFIX)
    if base_type is None:
        raise ModelError(f"{folder}: no model with replaced attention in it; make one with convert and save_pretrained")
    return converted_classes(base_type)


@functools.cache
def converted_classes(base_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config and model class of a converted ``base_type`` (``"llama"``), known to the Auto classes from now on."""
    base_config: Any
    base_model: Any
    base_config, base_model = causal_classes(base_type)

    class Config(base_config):
        model_type = PREFIX + base_type

    class Model(base_model):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _put_mixers(self, config.mixers)

    return made_known(Config, Model, prefix="Converted")


def _put_mixers(model: PreTrainedModel, mixers: Mapping[str, Any]) -> None:
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {key: value for key, value in mixers.items() if key != "layers"}
    paths = attention_paths(model)
    for index in mixers["layers"]:
        mixer = StateSpaceMixer(config.hidden_size, heads=heads, head_dim=head_dim, layer=index, **sizes)
        model.set_submodule(paths[index], mixer.to(model.dtype))


def _has_bias(attention: nn.Module) -> bool:
    return any(child.bias is not None for child in attention.children() if isinstance(child, nn.Linear))


def _projections(attention: nn.Module, inherit: Inherit) -> dict[str, nn.Linear]:
    wanted = PROJECTIONS if inherit == "all" else {key: PROJECTIONS[key] for key in ("value", "output")}
    found: dict[str, nn.Linear] = {}
    for role, names in wanted.items():
        options = (names,) if isinstance(names, str) else names
        linear = next((child for name, child in attention.named_children() if name in options), None)
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{type(attention).__name__} has no projection {' or '.join(options)} of its own to inherit; "
                "use inherit=none"
            )
        found[role] = linear
    return found


@torch.no_grad()
def _check_runs(model: PreTrainedModel) -> None:
    try:
        model.eval()(input_ids=torch.arange(5, device=model.device)[None], use_cache=False)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: does not run with its attention replaced ({error}); this kind is not supported"
        ) from error


@torch.no_grad()
def _keeps_states(model: PreTrainedModel) -> bool:
    """Whether the architecture passes its cache on to the modules in attention's place."""
    from transformers import DynamicCache

    from stillhouse.models.state_cache import StateLayer

    cache = DynamicCache()
    try:
        for token in range(2):
            model(input_ids=torch.full((1, 1), token, device=model.device), past_key_values=cache, use_cache=True)
        layers = [cache.layers[index] for index in model.config.mixers["layers"]]
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    return all(isinstance(layer, StateLayer) and layer.seen == 2 for layer in layers)


class LayerByLayer(nn.Module):
    """The layers of a converted model, each on an input given from outside: the teacher's, so errors do not add up.

    Called with ``layer -> input (B, T, D)``, it gives ``"layer" -> output``; no layer reads another's output, so the
    parameters of one get no gradient from another's loss.

    Args:
        model: a converted model; its parameters are this module's.
        layers: which; their attention has been replaced.
        give: ``"matrix"`` and ``"mixer"`` read what enters the attention and give the mixing matrix (B, H, T, T) or
            the mixer's output (B, T, D); ``"block"`` reads what enters the layer and gives the layer's output.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[int], *, give: Literal["matrix", "mixer", "block"]
    ) -> None:
        super().__init__()
        self.model, self.layers, self.give = model, list(layers), give
        paths = attention_paths(model)
        self.paths = {index: paths[index].rpartition(".")[0] if give == "block" else paths[index] for index in layers}

    def forward(self, inputs: Mapping[int, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
        return {str(index): self._one(self.model.get_submodule(self.paths[index]), inputs[index], mask)
                for index in self.layers}  # fmt: skip

    def _one(self, module: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden.to(next(module.parameters()).dtype)  # the teacher may compute in less
        if self.give == "matrix":
            return module.matrix(hidden, mask)
        needed = inspect.signature(module.forward).parameters.values()
        # What attention alone reads (positions, a mask of four dimensions) is not there.
        missing = {p.name: None for p in list(needed)[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        output = module(hidden, **{**missing, "attention_mask": mask})
        return output[0] if isinstance(output, tuple) else output
