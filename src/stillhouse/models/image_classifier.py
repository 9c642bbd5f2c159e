"""Image classifiers of ``transformers``: load them, make new ones, scale them down, prepare their images."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.base.errors import ModelError, one_line, suggest
from stillhouse.models.errors import clear_errors, quiet
from stillhouse.models.loading import check_config_file, check_report, local_folder
from stillhouse.models.scaling import parameter_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ALIASES = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
WIDTHS = ("hidden_size", "intermediate_size", "hidden_sizes", "embedding_size", "neck_hidden_sizes")
"""Fields of a config that grow with the width of the model."""


def load_image_classifier(
    name: str, *, dtype: str | torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load an image classifier from a directory or the hub, from safetensors only, in eval mode on the CPU.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from transformers import AutoModelForImageClassification

    config = read_image_config(name, trust_remote_code=trust_remote_code)
    folder = local_folder(name)
    if folder is not None and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no weights in it (*.safetensors); save the model with save_pretrained")
    with clear_errors(name):
        model, report = AutoModelForImageClassification.from_pretrained(
            folder or name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    check_report(name, report)
    return model.eval()


def read_image_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of an image classifier, in a directory or on the hub, without its weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    folder = local_folder(name)
    if folder is not None:
        check_config_file(folder, trust_remote_code=trust_remote_code)
    with clear_errors(name):
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
    if not trust_remote_code and config.model_type not in KNOWN:
        raise ModelError(
            f"{name}: {config.model_type} is not an image classifier; use a model that transformers loads with "
            "AutoModelForImageClassification, such as ResNetForImageClassification"
        )
    return config


def new_image_classifier(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A classifier with random weights that depend on ``seed`` only; no global random state moves."""
    from transformers import AutoModelForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            with quiet():
                return AutoModelForImageClassification.from_config(copy.deepcopy(config), dtype=torch.float32)
        except Exception as error:
            raise _unbuildable(config, error) from error


def with_classes(config: PretrainedConfig, classes: Sequence[str], **fields: Any) -> PretrainedConfig:
    """A copy of a config with these classes; ``fields`` that the config has are set too (channels, image size)."""
    raw = config.to_dict()
    raw |= {name: value for name, value in fields.items() if name in raw}
    raw |= {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
    raw.pop("num_labels", None)
    return type(config).from_dict(raw)


def classifier_from_spec(spec: str, config: PretrainedConfig) -> PretrainedConfig:
    """The config that a line such as ``scale:0.25`` or ``hidden_sizes=8-16,depths=1-1`` makes of ``config``.

    ``scale:R`` keeps the depth and makes every width smaller until at most the share R of the parameters is left.
    Other parts set any number, or list of numbers (with dashes), that the config has; ``layers`` and ``heads`` are
    understood.

    Raises:
        ModelError: naming the part of the line that is wrong, and what is allowed.
    """
    raw = config.to_dict()
    numbers = {name for name, value in raw.items() if _is_size(value)}
    ratio, sizes = None, {}
    for part in spec.replace(" ", "").split(","):
        name, _, value = part.partition(":" if part.startswith("scale:") else "=")
        name = ALIASES.get(name, name)
        try:
            if name == "scale" and ratio is None:
                ratio = float(value)
            elif name in numbers and name not in sizes:
                listed = [int(one) for one in value.split("-")]
                if min(listed) < 1:
                    raise ModelError(f"student {spec!r}: {part!r}: must be at least 1")
                sizes[name] = listed if isinstance(raw[name], list) else _single(listed)
            else:
                raise ModelError(
                    f"student {spec!r}: {part!r} sets nothing that a {config.model_type} model has"
                    f"{suggest(name, numbers)}; write scale:0.25 or NAME=NUMBER (lists with dashes: 8-16)"
                )
        except ValueError as error:
            raise ModelError(f"student {spec!r}: {part!r}: {value!r} is not a number") from error
    changed = _with_sizes(config, sizes)
    if ratio is None:
        _count(changed)  # a model that cannot be built is refused here
        return changed
    if not 0 < ratio <= 1:
        raise ModelError(f"student {spec!r}: scale must be above 0 and at most 1")
    return _narrowed(changed, ratio * _count(config), keep=sizes)


def _single(listed: list[int]) -> int:
    (number,) = listed
    return number


def _is_size(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, int) and not isinstance(one, bool) for one in values)


def _with_sizes(config: PretrainedConfig, sizes: dict[str, Any]) -> PretrainedConfig:
    raw = config.to_dict() | sizes
    widths, depths = raw.get("hidden_sizes"), raw.get("depths")
    if isinstance(widths, list) and isinstance(depths, list) and len(widths) != len(depths):
        raise ModelError(
            f"student: {len(widths)} hidden_sizes and {len(depths)} depths; a {config.model_type} model has one of "
            "each for every stage"
        )
    if "depths" in sizes:
        for name in ("stage_names", "out_features", "out_indices"):  # follow from the depths
            raw.pop(name, None)
        if "num_stages" in raw:
            raw["num_stages"] = len(sizes["depths"])
    try:
        return type(config).from_dict(raw)
    except Exception as error:
        raise _unbuildable(config, error) from error


def _narrowed(config: PretrainedConfig, budget: float, *, keep: dict[str, Any]) -> PretrainedConfig:
    """The widest of the models with all widths times f, f = 1, 0.99, ..., that has at most ``budget`` parameters."""
    raw = config.to_dict()
    heads = raw.get("num_attention_heads")
    multiple = heads if isinstance(heads, int) else 1
    widths = {name: raw[name] for name in WIDTHS if name in raw and name not in keep and _is_size(raw[name])}

    def at(factor: float) -> PretrainedConfig:
        def narrow(width: int) -> int:
            return max(multiple, round(width * factor / multiple) * multiple)

        made = {
            name: [narrow(one) for one in value] if isinstance(value, list) else narrow(value)
            for name, value in widths.items()
        }
        return _with_sizes(config, made)

    fitting = bisect.bisect_left(range(1, 101), True, key=lambda percent: _count(at(percent / 100)) > budget)
    if fitting:
        return at(fitting / 100)
    raise ModelError(
        f"student: no {config.model_type} model of these sizes has at most {math.floor(budget):,} parameters; use a "
        "larger scale, or set fewer layers (layers= or depths=) as well"
    )


def _count(config: PretrainedConfig) -> int:
    """Parameters of a model of this config, built without memory for them."""
    from transformers import AutoModelForImageClassification

    try:
        with quiet(), torch.device("meta"):
            return parameter_count(AutoModelForImageClassification.from_config(config))
    except Exception as error:
        raise _unbuildable(config, error) from error


def _unbuildable(config: PretrainedConfig, error: Exception) -> ModelError:
    return ModelError(
        f"student: a {config.model_type} model cannot be built with these sizes ({one_line(error)}); change them"
    )


# -- images for a model ---------------------------------------------------------------------------------------------


def image_processor(name: str | None, *, image_size: int | None, channels: int) -> Any:
    """How images are prepared for the model ``name``: its own processor, or one that resizes to ``image_size``.

    With ``image_size`` images are resized to that, with the model's own mean and deviation where it has them.

    Raises:
        ModelError: there is no model that brings a processor, and no size is known.
    """
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    own = None
    if name is not None:
        try:
            with quiet():
                own = AutoImageProcessor.from_pretrained(local_folder(name) or name)
        except (OSError, ValueError, ImportError):  # it brings none, or one that needs what is not installed
            own = None
    if own is not None and image_size is None:
        return own
    if image_size is None:
        who = f"{name}: it has no preprocessor_config.json" if name else "no model says how large images are"
        raise ModelError(f"{who}; set image_size=")
    mean = getattr(own, "image_mean", None) or [0.5] * channels
    std = getattr(own, "image_std", None) or [0.5] * channels
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=mean,
        image_std=std,
        do_convert_rgb=channels == 3,
    )


def plain_processor(image_size: int) -> Any:
    """The processor of the embedded images: grey, in [0, 1], not normalised."""
    from transformers import ViTImageProcessorPil

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessorPil(size=size, do_normalize=False, do_convert_rgb=False)


def pixels_of(processor: Any) -> Callable[[list[Any]], Tensor]:
    """PIL images to what the model reads: (B, C, H, W)."""
    import numpy as np

    def process(images: list[Any]) -> Tensor:
        arrays = [np.asarray(image) for image in images]
        shaped = [array[..., None] if array.ndim == 2 else array for array in arrays]
        with quiet():
            return processor(images=shaped, input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    return process


def save_classifier(model: Any, folder: Path, *, processor: Any) -> None:
    """Write a classifier and its image processor the way ``transformers`` loads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
