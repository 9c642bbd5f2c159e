"""Load causal language models and their tokenizers with clear errors.

``transformers`` does the loading. Nothing here unpickles, and code that comes with a model runs only if the user has
said so.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillhouse.base.errors import ModelError, near, one_line, suggest
from stillhouse.models.conversion import is_converted, load_converted
from stillhouse.models.errors import clear_errors
from stillhouse.models.input_expansion import is_expanded, load_expanded
from stillhouse.models.swiftkv import is_swiftkv, load_swiftkv

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "merges.txt", "tekken.json", "*.tiktoken")


def load_causal_lm(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str = "main",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from a directory or the hub, from safetensors only.

    Args:
        name: a directory written by ``save_pretrained``, or a hub id such as ``org/name``.
        dtype: ``"auto"`` (as saved), a torch dtype or its name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the model.
        attn_implementation: for example ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``.

    Returns:
        The model, in eval mode on the CPU, and the tokenizer.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do. Also if the weights lack tensors
            the config asks for, or have them in other shapes: nothing is filled with random numbers.
    """
    from transformers import AutoModelForCausalLM

    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted != "auto" and not isinstance(wanted, torch.dtype):
        raise ModelError(f"dtype={dtype!r}: must be auto, float32, bfloat16 or float16")
    folder = local_folder(name)
    kinds = ((is_converted, load_converted), (is_swiftkv, load_swiftkv), (is_expanded, load_expanded))
    load = next((load for known, load in kinds if folder is not None and known(folder)), None)
    if folder is not None and load is not None:  # changed by stillhouse: types of their own
        check_files(folder)
        model = load(folder, dtype=wanted if isinstance(wanted, torch.dtype) else None)
        tokenizer = load_tokenizer(name, folder, revision=revision, trust_remote_code=False)
        _check_ids_fit(name, model, tokenizer)
        return model, tokenizer
    config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    if folder is not None:
        check_files(folder)
    with clear_errors(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder or name,
            config=config,
            dtype=wanted,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    check_report(name, report)
    tokenizer = load_tokenizer(name, folder, revision=revision, trust_remote_code=trust_remote_code)
    _check_ids_fit(name, model, tokenizer)
    return model.eval(), tokenizer


def read_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the config of a causal language model, in a directory or on the hub, without its weights.

    Raises:
        ModelError: as :func:`load_causal_lm`.
    """
    from transformers import AutoConfig

    folder = local_folder(name)
    if folder is not None:
        check_config_file(folder, trust_remote_code=trust_remote_code)
    with clear_errors(name):
        config = AutoConfig.from_pretrained(folder or name, revision=revision, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        _check_is_causal(name, config.model_type, getattr(config, "architectures", None))
    return config


def has_remote_code(directory: str | Path) -> bool:
    """True if a model directory asks for Python code of its own (``auto_map`` in its config or tokenizer)."""
    return any(
        isinstance(known, dict) and known.get("auto_map")
        for known in (_read_json(Path(directory) / name) for name in ("config.json", "tokenizer_config.json"))
    )


def load_tokenizer(
    name: str, folder: Path | None, *, revision: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """As saved: for some model types AutoTokenizer would put rules of its own around a general tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    place = folder or name
    with clear_errors(f"{name} (its tokenizer)"):
        known = get_tokenizer_config(place, revision=revision)
        if known.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast") and "auto_map" not in known:
            return PreTrainedTokenizerFast.from_pretrained(place, revision=revision)
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code)


def local_folder(name: str) -> Path | None:
    """The directory ``name`` stands for, or None if it is a hub id; an error if it can be neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        advice = "GGUF is not read; use the original model" if path.suffix == ".gguf" else f"give {path.parent}"
        raise ModelError(f"{name}: a file, must be the directory of a model; {advice}")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        where = "no such directory" if path.parent.is_dir() else f"no such directory ({path.parent} does not exist)"
        raise ModelError(f"{name}: {where}{near(path) or '; check the path'}")
    return None


# Checks of a directory, before anything is loaded


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ModelError(f"{path}: no permission; allow it, for example with: chmod u+r {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({one_line(error)}); save or download it again") from error


def check_config_file(folder: Path, *, trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = folder / "config.json"
    config = _read_json(path)
    if config is None:
        raise ModelError(_no_config(folder))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str):
        raise ModelError(f"{path}: names no model_type; give the config.json that save_pretrained wrote")
    if kind in CONFIG_MAPPING_NAMES or trust_remote_code:
        return
    if config.get("auto_map"):
        raise ModelError(
            f"{folder}: model type {kind!r} needs Python code that comes with the model; read its *.py files, "
            "and if you trust them set trust_remote_code=true"
        )
    raise ModelError(
        f"{path}: unknown model_type {kind!r}{suggest(kind, CONFIG_MAPPING_NAMES)}; check it, or update transformers"
    )


def _no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: a PEFT adapter, not a whole model; merge it into its base model and save that"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    advice = f"one of its folders {', '.join(inner[:5])}" if inner else "a directory written by save_pretrained"
    return f"{folder}: no config.json in it, so not a model; give {advice}"


def _check_is_causal(name: str, kind: str, architectures: list[str] | None) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    what = architectures[0] if architectures else None
    if kind in KNOWN and (what is None or what in KNOWN.values() or "ConditionalGeneration" in what):
        return
    raise ModelError(
        f"{name}: {what or kind} is not a causal language model; use a model that predicts the next token, "
        "such as LlamaForCausalLM"
    )


def check_files(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    files = _shards(folder, index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(_no_weights(folder))
    for file in files:
        _check_safetensors(file)
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder}: no tokenizer files in it (such as tokenizer.json); save the model's tokenizer there with "
            "tokenizer.save_pretrained"
        )


def _shards(folder: Path, index: Path) -> list[Path]:
    known = _read_json(index)
    names = known.get("weight_map") if isinstance(known, dict) else None
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: has no weight_map; save or download the model again")
    shards = sorted({folder / str(name) for name in names.values()})
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(shards)} weight files are missing (first: {missing[0]}); "
            "copy or download them"
        )
    return shards


def _no_weights(folder: Path) -> str:
    pickled = sorted(
        path.name for path in folder.iterdir() if path.suffix in PICKLED and path.name != "training_args.bin"
    )
    if pickled:
        return (
            f"{folder}: only pickled weights ({pickled[0]}), which can run code when opened; convert a model you "
            "trust: load it with transformers (it reads weights only) and save_pretrained(NEW), then give NEW"
        )
    return f"{folder}: no weights in it (*.safetensors); save the model with save_pretrained, or finish the download"


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            start = opened.read(32)
        if start.startswith(b"version https://git-lfs"):
            raise ModelError(f"{file}: a Git LFS pointer, not the weights; fetch them: git lfs pull")
        with safe_open(file, framework="pt"):
            pass
    except PermissionError as error:
        raise ModelError(f"{file}: no permission; allow it, for example with: chmod u+r {file}") from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged or cut short ({one_line(error)}); save, copy or download it again"
        ) from error


# Checks of what was loaded


def check_report(name: str, report: dict[str, Any]) -> None:
    missing, problem = sorted(report["missing_keys"]), ""
    if report["mismatched_keys"]:
        key, saved, expected = min(report["mismatched_keys"])
        problem = f"{key} is {tuple(saved)} in the weights, {tuple(expected)} by the config"
    elif missing:
        problem = f"{len(missing)} tensors are missing (first: {missing[0]})"
    if problem:
        raise ModelError(
            f"{name}: weights and config.json do not fit: {problem}; use the config these weights were saved with"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        warnings.warn(f"{name}: {len(unused)} tensors of the weights are not used (first: {unused[0]})", stacklevel=3)


def _check_ids_fit(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer of another model would ask for embeddings that do not exist."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id or 0, tokenizer.bos_token_id or 0)
    if largest >= rows:
        raise ModelError(
            f"{name}: its tokenizer uses ids up to {largest}, its embedding has {rows} rows; "
            "put the tokenizer there that the model was trained with"
        )
