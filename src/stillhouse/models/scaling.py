"""Students of a teacher's architecture: fewer layers, narrower ones, or a given share of its parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stillhouse.base.errors import ModelError, one_line, suggest
from stillhouse.models.errors import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SIZES = {
    "layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}
"""Size -> names in configs; the first that the config has counts."""

SCALED_WITH_WIDTH = ("moe_intermediate_size", "shared_expert_intermediate_size", "word_embed_proj_dim")


class _Shape(NamedTuple):
    """The sizes of a decoder that are scaled; None where the architecture has no such number."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None


def scaled_config(
    teacher_config: PretrainedConfig, *, ratio: float | None = None, whole_heads: bool = False, **sizes: int | None
) -> PretrainedConfig:
    """The teacher's architecture made smaller; same vocabulary, same kind of layers.

    With ``ratio`` depth and width are searched together: the parameters are at most ``ratio`` times the teacher's,
    as near to that as the proportion of depth to width (kept close to the teacher's) allows. Sizes that are neither
    given nor searched follow the width (heads, key-value heads, feed-forward) or stay as they are. The size of one
    head stays the teacher's where the width allows it; patterns of layer types keep their order.

    Args:
        ratio: fraction of the teacher's parameters, in (0, 1].
        whole_heads: search only widths that are whole heads of the teacher's size.
        sizes: any of ``layers``, ``hidden_size``, ``heads``, ``kv_heads``, ``head_dim`` and ``intermediate_size``;
            they are kept as given.

    Raises:
        ModelError: sizes that do not go together, an architecture that cannot be scaled, or a ratio that is too small
            (the embedding of the vocabulary alone may be larger).
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ModelError(f"student: {name}={value}: must be at least 1")
    config = teacher_config.get_text_config(decoder=True)  # the language part of a model that also sees
    teacher = _shape_of(config)
    if ratio is None:
        small = _resized(config, _widened(teacher, given))
        config_parameters(small)  # a model that cannot be built is refused here
        return small
    if not 0 < ratio <= 1:
        raise ModelError(f"student: scale {ratio}: must be above 0 and at most 1")
    return _search(config, teacher, given, ratio, _widths(teacher, whole_heads))


def student_from_spec(spec: str, teacher_config: PretrainedConfig) -> PretrainedConfig:
    """The student that a line such as ``scale:0.25``, ``layers=4,hidden_size=256`` or both together describes.

    Raises:
        ModelError: naming the part of the line that is wrong, and what is allowed.
    """
    aliases = {alias: name for name, known in SIZES.items() for alias in (name, *known)}
    sizes: dict[str, Any] = {}
    ratio = None
    for part in spec.replace(" ", "").split(","):
        name, sign, value = part.partition(":" if part.startswith("scale:") else "=")
        if name == "scale" and ratio is None and sign:
            ratio = _number(value, float, part, "a fraction such as scale:0.25")
        elif name in aliases and aliases[name] not in sizes and sign == "=":
            sizes[aliases[name]] = int(_number(value, int, part, "a whole number"))
        else:
            known = sign and (name in aliases or name == "scale")
            problem = f"{name} is there twice" if known else f"{part!r} is not a size{suggest(name, SIZES)}"
            raise ModelError(f"student {spec!r}: {problem}; write scale:0.25 or layers=4,hidden_size=256")
    return scaled_config(teacher_config, ratio=ratio, **sizes)


def new_causal_lm(config: PretrainedConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with random weights that depend on ``seed`` only; no global random state moves.

    Raises:
        ModelError: a config that no causal language model can be built from.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), _buildable(config):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters; weights that are tied count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _number(value: str, kind: Callable[[str], float], part: str, wanted: str) -> float:
    try:
        return kind(value)
    except ValueError as error:
        raise ModelError(f"student: {part!r}: must be {wanted}") from error


# Shapes and configs


def _name_in(config: PretrainedConfig, size: str) -> str | None:
    """What a config calls a size, or None."""
    for name in SIZES[size]:
        computed = isinstance(getattr(type(config), name, None), property)  # Falcon's head_dim
        if not computed and getattr(config, name, None) is not None:
            return config.attribute_map.get(name, name)
    return None


def _shape_of(config: PretrainedConfig) -> _Shape:
    sizes: dict[str, Any] = {size: getattr(config, _name_in(config, size) or "", None) for size in SIZES}
    for size in ("layers", "hidden_size", "heads"):
        if not isinstance(sizes[size], int):
            raise ModelError(
                f"student: a {config.model_type} teacher cannot be scaled (its config has no number of {size}); "
                "give a student model instead"
            )
    return _Shape(**sizes)


def _resized(config: PretrainedConfig, shape: _Shape) -> PretrainedConfig:
    """A copy of a config with other sizes, checked by its own class."""
    raw = config.to_dict()
    before = _shape_of(config)
    for size, value in shape._asdict().items():
        name = _name_in(config, size)
        if name is not None:
            raw[name] = value
        elif value is not None:
            raise ModelError(f"student: {size} cannot be set for a {config.model_type} model; leave it out")
    for name in SCALED_WITH_WIDTH:
        if raw.get(name) == before.hidden_size:
            raw[name] = shape.hidden_size
        elif isinstance(raw.get(name), int):
            raw[name] = _scaled(raw[name], shape.hidden_size / before.hidden_size)
    if before.head_dim is not None and raw.get("query_pre_attn_scalar") == before.head_dim:
        raw["query_pre_attn_scalar"] = shape.head_dim
    for name, value in raw.items():  # layer_types and the like
        if isinstance(value, list) and len(value) == before.layers and ("layer" in name or "block" in name):
            raw[name] = _resampled(value, shape.layers)
    if "attention_types" in raw and "attention_layers" in raw:  # GPT-Neo keeps the same list twice
        raw["attention_types"] = [[raw["attention_layers"], 1]]
    with _buildable(config):
        return type(config).from_dict(raw)


def _resampled(values: list[Any], count: int) -> list[Any]:
    """``count`` entries of a per-layer list: its pattern repeated, or thinned evenly down to its last entry."""
    period = next(
        length
        for length in range(1, len(values) + 1)
        if all(value == values[index % length] for index, value in enumerate(values))
    )
    if count >= period:
        return [values[index % period] for index in range(count)]
    return [values[round((index + 1) * period / count) - 1] for index in range(count)]


def _scaled(size: int, factor: float) -> int:
    """Rounded to what kernels like."""
    return size if factor == 1 else max(8, round(size * factor / 8) * 8)


def _widened(teacher: _Shape, given: dict[str, int]) -> _Shape:
    """The teacher's shape with the given sizes; what is not given follows the width."""
    heads = given.get("heads") or _heads_for(teacher, given.get("hidden_size", teacher.hidden_size))
    width = given.get("hidden_size", round(teacher.hidden_size * heads / teacher.heads))
    kv_heads, head_dim, feed_forward = teacher.kv_heads, teacher.head_dim, teacher.intermediate_size
    if kv_heads is not None:
        wanted = max(1, round(heads * kv_heads / teacher.heads))
        kv_heads = max(count for count in range(1, wanted + 1) if heads % count == 0)
    if head_dim is not None and head_dim * teacher.heads == teacher.hidden_size:
        head_dim = width // heads
    if feed_forward is not None:
        feed_forward = _scaled(feed_forward, width / teacher.hidden_size)
    return _Shape(teacher.layers, width, heads, kv_heads, head_dim, feed_forward)._replace(**given)


def _heads_for(teacher: _Shape, width: int) -> int:
    """The number of heads for a width: as many as keep the size of a head nearest to the teacher's."""
    if width == teacher.hidden_size:
        return teacher.heads
    per_head = teacher.hidden_size / teacher.heads
    steps = (8, 2, 1) if per_head >= 32 and per_head % 8 == 0 else (2, 1)  # kernels like 8, rotary embeddings need 2
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    regular = ([heads for heads in divisors if width // heads % step == 0] for step in steps)
    return min(next(fit for fit in regular if fit), key=lambda heads: abs(math.log(width / heads / per_head)))


# The search for a share of the parameters


def _search(
    config: PretrainedConfig, teacher: _Shape, given: dict[str, int], ratio: float, wide: list[int]
) -> PretrainedConfig:
    """The best of one candidate a width: the deepest that fits."""
    budget = ratio * config_parameters(config)
    widths = [] if {"hidden_size", "heads"} & given.keys() else [{"hidden_size": width} for width in wide]
    shapes = [_widened(teacher, given | width) for width in widths or [{}]]
    least = given.get("layers", 1)
    found = [fit for shape in shapes if (fit := _deepest(config, shape, budget, least)) is not None]
    if not found:
        raise ModelError(
            f"student: no model with scale {ratio} and the given sizes is small enough ({budget:,.0f} parameters); "
            "use a larger scale, or fewer fixed sizes (the embedding of the vocabulary does not shrink with depth)"
        )
    best = min(found, key=lambda fit: 1 - fit[0] / budget + _misproportion(teacher, fit[1]))[1]
    depths = (_resized(config, best._replace(layers=layers)) for layers in range(best.layers, least - 1, -1))
    return next(small for small in depths if config_parameters(small) <= budget)


def _widths(teacher: _Shape, whole_heads: bool) -> list[int]:
    """Widths up to the teacher's, at least 12 of them where they can be whole heads, or halves or quarters of one."""
    width = teacher.hidden_size
    step = width // teacher.heads if width % teacher.heads == 0 else math.gcd(width, 32)
    while step % 2 == 0 and width // step < 12 and not whole_heads:
        step //= 2
    return list(range(step, width + 1, step))


def _deepest(config: PretrainedConfig, shape: _Shape, budget: float, least: int) -> tuple[float, _Shape] | None:
    """(parameters, shape) with as many layers as fit into the budget, by a line through two counts; None if none do.

    Two counts of few layers suffice where layers are alike or alternate; elsewhere the line is an estimate.
    """
    first = config_parameters(_resized(config, shape._replace(layers=least)))
    if first > budget:
        return None
    if least >= shape.layers:
        return first, shape
    more = min(2, shape.layers - least)
    per_layer = (config_parameters(_resized(config, shape._replace(layers=least + more))) - first) / more
    layers = min(shape.layers, least + int((budget - first) / per_layer))
    return first + (layers - least) * per_layer, shape._replace(layers=layers)


def _misproportion(teacher: _Shape, shape: _Shape) -> float:
    """How far a student's proportions are from the teacher's, in shares of the budget worth giving up for them."""

    def apart(first: float, second: float) -> float:
        return abs(math.log(first / second))

    groups = apart(shape.heads / (shape.kv_heads or 1), teacher.heads / (teacher.kv_heads or 1))
    return (
        0.25 * apart(shape.layers / teacher.layers, shape.hidden_size / teacher.hidden_size)
        + 0.1 * apart(shape.hidden_size / shape.heads, teacher.hidden_size / teacher.heads)
        + (0.1 * groups if shape.kv_heads else 0.0)
    )


def config_parameters(config: PretrainedConfig) -> int:
    """Parameters of a model of this config, built without memory for them."""
    from transformers import AutoModelForCausalLM

    with _buildable(config), torch.device("meta"):
        return parameter_count(AutoModelForCausalLM.from_config(config))


@contextmanager
def _buildable(config: PretrainedConfig) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:
        raise ModelError(
            f"student: a {config.model_type} model cannot be built with these sizes ({one_line(error)}); change them"
        ) from error
