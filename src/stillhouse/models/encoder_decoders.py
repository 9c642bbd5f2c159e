"""Encoder-decoder language models such as T5, and their encoders alone: load them, make small ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from stillhouse.base.errors import ModelError, one_line, suggest
from stillhouse.base.files import read_json
from stillhouse.models.conversion import is_converted
from stillhouse.models.errors import clear_errors, quiet
from stillhouse.models.input_expansion import is_expanded
from stillhouse.models.loading import check_config_file, check_files, check_report, load_tokenizer, local_folder
from stillhouse.models.swiftkv import is_swiftkv

SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
}


def is_encoder_decoder(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a directory, or a hub id, is that of a model with an encoder and a decoder."""
    folder = local_folder(name)
    if folder is not None and any(known(folder) for known in (is_converted, is_swiftkv, is_expanded)):
        return False  # changed by stillhouse, of types that transformers does not know
    return bool(_config(name, trust_remote_code).is_encoder_decoder)


def is_text_encoder(name: str | Path) -> bool:
    """Whether a directory holds an encoder alone, as `new_text_encoder` makes it."""
    path = Path(name).expanduser() / "config.json"
    known = read_json(path) if path.is_file() else {}
    return any(str(one).endswith("EncoderModel") for one in known.get("architectures") or [])


def load_encoder_decoder(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """An encoder-decoder language model in float32 and eval mode, and its tokenizer.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as KNOWN

    config = _config(name, trust_remote_code)
    if config.model_type not in KNOWN and not trust_remote_code:
        raise ModelError(f"{name}: a {config.model_type} does not write text; use an encoder-decoder such as a T5")
    if config.decoder_start_token_id is None:
        raise ModelError(f"{name}: config.json has no decoder_start_token_id, the token a text begins with; add it")
    return _load(AutoModelForSeq2SeqLM, name, config, trust_remote_code)


def load_text_encoder(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The encoder of an encoder-decoder model, or one that was saved alone, and its tokenizer; as above."""
    from transformers import AutoModelForTextEncoding

    config = _config(name, trust_remote_code)
    _check_encoder(config, name)
    return _load(AutoModelForTextEncoding, name, config, trust_remote_code)


def new_text_encoder(spec: str, config: Any, *, seed: int) -> Any:
    """The encoder of a T5, made smaller, with random weights: ``layers=2,hidden_size=48``.

    Raises:
        ModelError: a size that is not one, or an architecture without an encoder of its own.
    """
    from transformers import AutoModelForTextEncoding

    _check_encoder(config, f"student {spec!r}")
    small = copy.deepcopy(config)
    for part in spec.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if name not in SIZES or not value.isdigit() or int(value) < 1:
            raise ModelError(
                f"student {spec!r}: {part!r} is not a size of an encoder{suggest(name, SIZES)}; write "
                "layers=2,hidden_size=48 (heads, head_dim and intermediate_size stay the teacher's)"
            )
        setattr(small, SIZES[name], int(value))
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.default_generator.manual_seed(seed)
            return AutoModelForTextEncoding.from_config(small, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"student {spec!r}: no encoder can be built so ({one_line(error)})") from error


def _check_encoder(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as KNOWN

    if not str(KNOWN.get(config.model_type)).endswith("EncoderModel"):
        known = ", ".join(sorted(kind for kind, made in KNOWN.items() if made.endswith("EncoderModel")))
        raise ModelError(
            f"{name}: the encoder of a {config.model_type} does not stand alone in transformers; give a causal LM with "
            f"the same tokenizer, or one of: {known}"
        )


def _config(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    folder = local_folder(name)
    if folder is not None:
        check_config_file(folder, trust_remote_code=trust_remote_code)
    with clear_errors(name):
        return AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)


def _load(auto: Any, name: str, config: Any, trust_remote_code: bool) -> tuple[Any, Any]:
    folder = local_folder(name)
    if folder is not None:
        check_files(folder)
    with clear_errors(name):
        model, report = auto.from_pretrained(
            folder or name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            output_loading_info=True,
        )
    halved = type(model).__name__.endswith("EncoderModel")  # the rest of the weights is left out on purpose
    check_report(name, {**report, "unexpected_keys": []} if halved else report)
    return model.eval(), load_tokenizer(name, folder, revision="main", trust_remote_code=trust_remote_code)
