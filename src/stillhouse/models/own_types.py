"""Model types of our own: a class of ``transformers`` with something changed, told by the prefix of its model type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillhouse.base.errors import ModelError, RunError
from stillhouse.base.files import read_json
from stillhouse.models.errors import clear_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_type_in(folder: str | Path, prefix: str) -> str | None:
    """The model type that the model in a directory was made of (``"llama"``); None if its type has no such prefix."""
    try:
        config = read_json(Path(folder) / "config.json")
    except RunError:
        return None
    kind = str(config.get("model_type")) if isinstance(config, dict) else ""
    return kind.removeprefix(prefix) if kind.startswith(prefix) else None


def causal_classes(base_type: str) -> tuple[Any, Any]:
    """The config and model class of a causal language model of ``transformers``, to be changed.

    Raises:
        ModelError: this version of ``transformers`` has none of that type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if base_type not in CONFIG_MAPPING or CONFIG_MAPPING[base_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{base_type!r} is no causal language model of this version of transformers; update it")
    return CONFIG_MAPPING[base_type], MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base_type]]


def made_known(config_class: Any, model_class: Any, *, prefix: str) -> tuple[Any, Any]:
    """Name two classes after those they change, and let the Auto classes load them from now on; returns them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for one in (config_class, model_class):
        one.__name__ = one.__qualname__ = prefix + one.__base__.__name__
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


def load_saved(model_class: Any, folder: str | Path, *, dtype: torch.dtype | None) -> PreTrainedModel:
    """What ``save_pretrained`` wrote into ``folder``, in eval mode; nothing is filled with random numbers.

    Raises:
        ModelError: weights that do not fit the config.
    """
    with clear_errors(str(folder)):
        model, report = model_class.from_pretrained(
            str(folder), dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ModelError(f"{folder}: weights are missing (first: {min(report['missing_keys'])}); save the model again")
    return model.eval()
