"""Causal language models: load them with clear errors, scale a student down from a teacher, find the head.

``transformers`` does the loading. Nothing here unpickles, and code that comes with a model runs only if the
user has said so. Suffixes: ``B`` batch, ``T`` time, ``V`` vocabulary.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stillhouse.base.errors import ModelError, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


# Loading


def load_causal_lm(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
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

    wanted = _dtype(dtype)
    config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    folder = _local_folder(name)
    if folder is not None:
        _check_weights(folder)
        _check_tokenizer_files(folder)
    with _clear_errors(name), _quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder or name,
            config=config,
            dtype=wanted,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    _check_report(name, report)
    tokenizer = _load_tokenizer(name, folder, revision=revision, trust_remote_code=trust_remote_code)
    _check_ids_fit(name, model, tokenizer)
    return model.eval(), tokenizer


def read_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the config of a causal language model, in a directory or on the hub, without its weights.

    Raises:
        ModelError: as :func:`load_causal_lm`.
    """
    from transformers import AutoConfig

    folder = _local_folder(name)
    if folder is not None:
        _check_config_file(folder, trust_remote_code=trust_remote_code)
    with _clear_errors(name), _quiet():
        config = AutoConfig.from_pretrained(
            folder or name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if not trust_remote_code:
        _check_is_causal(name, config.model_type, getattr(config, "architectures", None))
    return config


def has_remote_code(directory: str | Path) -> bool:
    """True if a model directory asks for Python code of its own (``auto_map`` in its config or tokenizer)."""
    return any(
        isinstance(known, dict) and known.get("auto_map")
        for known in (_read_json(Path(directory) / name) for name in ("config.json", "tokenizer_config.json"))
    )


def _load_tokenizer(
    name: str, folder: Path | None, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """As saved: for some model types AutoTokenizer would put rules of its own around a general tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    place, where = folder or name, {"revision": revision or "main"}
    with _clear_errors(f"{name} (its tokenizer)"), _quiet():
        known = get_tokenizer_config(place, **where)
        if known.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast") and "auto_map" not in known:
            return PreTrainedTokenizerFast.from_pretrained(place, **where)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **where)


def _local_folder(name: str) -> Path | None:
    """The directory ``name`` stands for, or None if it is a hub id; an error if it can be neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        advice = "GGUF is not read; use the original model" if path.suffix == ".gguf" else f"give {path.parent}"
        raise ModelError(f"{name}: a file, must be the directory of a model; {advice}")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/"):
        where = "no such directory" if path.parent.is_dir() else f"no such directory ({path.parent} does not exist)"
        raise ModelError(f"{name}: {where}{_near(path) or '; check the path'}")
    return None


def _near(path: Path) -> str:
    """Directories beside ``path`` with a similar name, as the end of a message; empty if there are none."""
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside)
    return suggest(path.name, close) if close else ""


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"dtype={dtype!r}: must be auto, float32, bfloat16 or float16")
    return found


# Checks of a directory, before anything is loaded


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ModelError(f"{path}: no permission; allow it, for example with: chmod u+r {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({_reason(error)}); save or download it again") from error


def _check_config_file(folder: Path, *, trust_remote_code: bool) -> None:
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
        f"{path}: unknown model_type {kind!r}{suggest(kind, _close(kind, CONFIG_MAPPING_NAMES))}; "
        "check it, or update transformers"
    )


def _close(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known))


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


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _shards(folder, index)
    if not files:
        raise ModelError(_no_weights(folder))
    for file in files:
        _check_safetensors(file)


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
        raise ModelError(f"{file}: damaged or cut short ({_reason(error)}); save, copy or download it again") from error


def _check_tokenizer_files(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not list(folder.glob("*.tiktoken")):
        raise ModelError(
            f"{folder}: no tokenizer files in it (such as tokenizer.json); save the model's tokenizer there with "
            "tokenizer.save_pretrained"
        )


# Checks of what was loaded


def _check_report(name: str, report: dict[str, Any]) -> None:
    mismatched = sorted(report.get("mismatched_keys") or [])
    if mismatched:
        key, saved, expected = mismatched[0]
        raise ModelError(
            f"{name}: weights and config.json do not fit: {key} is {tuple(saved)} in the weights, {tuple(expected)} "
            f"by the config ({len(mismatched)} such tensors); use the config these weights were saved with"
        )
    missing = sorted(report.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"{name}: weights and config.json do not fit: {len(missing)} tensors are missing (first: {missing[0]}); "
            "use the config these weights were saved with, or the whole weights"
        )
    unused = sorted(report.get("unexpected_keys") or [])
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


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers: what matters in them becomes an error here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Whatever loading raises becomes one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name}: {_what_to_do(error, name)}") from error


def _what_to_do(error: Exception, name: str) -> str:
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    causes = list(_causes(error))
    text = " ".join(str(cause) for cause in causes)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    near = _near(Path(name.split(" (")[0]).expanduser())
    if among(hub.GatedRepoError):
        return "access to this hub model must be granted; ask for it on its page, then: hf auth login"
    if among(hub.RevisionNotFoundError):
        return "no such revision on the hub; check revision="
    if among(hub.RepositoryNotFoundError, hub.HFValidationError):
        return f"no such directory, and no such hub model (or it is private: hf auth login){near or '; check the name'}"
    if among(SafetensorError):
        return f"weights damaged or cut short ({_reason(error)}); download or save them again"
    if "trust_remote_code" in text:
        return "needs Python code that comes with it; read it, and if you trust it set trust_remote_code=true"
    if "safetensors" in text and "file named" in text:
        return "no safetensors weights on the hub; use a revision that has them, or convert a copy you trust"
    if among(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return f"no such directory, and the hub cannot be reached; give a local directory, or go online{near}"
    if among(ImportError):
        return f"a package is missing ({_reason(error)}); install it"
    return f"cannot be loaded ({_reason(error)}); check its files, or save or download it again"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """What an exception says, short and on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")


# Students


@dataclass(frozen=True)
class _Shape:
    """The sizes of a decoder that are scaled; None where the architecture has no such number."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None


CANONICAL = {
    "layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}
"""Size -> names in configs; the first that the config has counts."""

SCALED_WITH_WIDTH = ("moe_intermediate_size", "shared_expert_intermediate_size", "word_embed_proj_dim")
LISTS_OF_LAYERS = ("mlp_only_layers", "moe_layers")


def scaled_config(
    teacher_config: PretrainedConfig,
    *,
    ratio: float | None = None,
    layers: int | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
) -> PretrainedConfig:
    """The teacher's architecture made smaller; same vocabulary, same kind of layers.

    With ``ratio`` depth and width are searched together: the parameters are at most ``ratio`` times the
    teacher's, as near to that as the proportion of depth to width (kept close to the teacher's) allows.
    Sizes that are given are kept as they are. Sizes that are neither given nor searched follow the width
    (heads, key-value heads, feed-forward) or stay as they are. The size of one head stays the teacher's where
    the width allows it; patterns of layer types keep their order, and each type that fits.

    Args:
        ratio: fraction of the teacher's parameters, in (0, 1].
        layers, hidden_size, heads, kv_heads, head_dim, intermediate_size: sizes to set.

    Raises:
        ModelError: sizes that do not go together, an architecture that cannot be scaled, or a ratio that is
            too small (the embedding of the vocabulary alone may be larger).
    """
    asked = {
        "layers": layers,
        "hidden_size": hidden_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ModelError(f"student: {name}={value}: must be at least 1")
    config = _decoder_config(teacher_config)
    teacher = _shape_of(config)
    if ratio is None:
        small = _resized(config, _widened(teacher, given, _heads_for(teacher, given)))
        _count(small)
        return small
    if not 0 < ratio <= 1:
        raise ModelError(f"student: scale {ratio}: must be above 0 and at most 1")
    return _search(config, teacher, given, ratio)


def student_from_spec(spec: str, teacher_config: PretrainedConfig) -> PretrainedConfig:
    """The student that a line such as ``scale:0.25``, ``layers=4,hidden_size=256`` or both together describes.

    Raises:
        ModelError: naming the part of the line that is wrong, and what is allowed.
    """
    aliases = {alias: name for name, known in CANONICAL.items() for alias in (name, *known)}
    sizes: dict[str, int] = {}
    ratio = None
    for part in spec.replace(" ", "").split(","):
        name, sign, value = part.partition(":" if part.startswith("scale:") else "=")
        if name == "scale" and ratio is None and sign:
            ratio = _number(value, float, part, "a fraction such as scale:0.25")
        elif name in aliases and aliases[name] not in sizes and sign == "=":
            sizes[aliases[name]] = int(_number(value, int, part, "a whole number"))
        else:
            known = sign and (name in aliases or name == "scale")
            problem = f"{name} is there twice" if known else f"{part!r} is not a size{suggest(name, CANONICAL)}"
            raise ModelError(f"student {spec!r}: {problem}; write scale:0.25 or layers=4,hidden_size=256")
    return scaled_config(teacher_config, ratio=ratio, **sizes)


def _number(value: str, kind: Callable[[str], float], part: str, wanted: str) -> float:
    try:
        return kind(value)
    except ValueError as error:
        raise ModelError(f"student: {part!r}: must be {wanted}") from error


def new_causal_lm(config: PretrainedConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with random weights that depend on ``seed`` only; no global random state moves.

    Raises:
        ModelError: a config that no causal language model can be built from.
    """
    from transformers import AutoModelForCausalLM

    own = type(config).from_dict(config.to_dict())
    with torch.random.fork_rng(devices=[]), _buildable(own):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        return AutoModelForCausalLM.from_config(own, dtype=dtype)


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters; weights that are tied count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _decoder_config(config: PretrainedConfig) -> Any:
    """The language part of a config (of a model that also sees, for example)."""
    return config.get_text_config(decoder=True)


def _name_in(config: PretrainedConfig, size: str) -> str | None:
    """What a config calls a size, or None."""
    for name in CANONICAL[size]:
        computed = isinstance(getattr(type(config), name, None), property)  # Falcon's head_dim
        if not computed and getattr(config, name, None) is not None:
            return config.attribute_map.get(name, name)
    return None


def _shape_of(config: PretrainedConfig) -> _Shape:
    sizes: dict[str, Any] = {}
    for size in CANONICAL:
        name = _name_in(config, size)
        sizes[size] = getattr(config, name) if name else None
        if size in ("layers", "hidden_size", "heads") and not isinstance(sizes[size], int):
            raise ModelError(
                f"student: a {config.model_type} teacher cannot be scaled (its config has no number of {size}); "
                "give a student model instead"
            )
    return _Shape(**sizes)


def _heads_for(teacher: _Shape, given: dict[str, int]) -> int:
    """The number of heads for a width: as many as keep the size of a head nearest to the teacher's."""
    width = given.get("hidden_size", teacher.hidden_size)
    if "heads" in given or width == teacher.hidden_size:
        return given.get("heads", teacher.heads)
    per_head = teacher.hidden_size / teacher.heads
    step = 8 if per_head >= 32 and per_head % 8 == 0 else 2  # rotary embeddings pair channels, kernels like 8
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    regular = [heads for heads in divisors if width // heads % step == 0]
    return min(regular or divisors, key=lambda heads: abs(math.log(width / heads / per_head)))


def _widened(teacher: _Shape, given: dict[str, int], heads: int) -> _Shape:
    """The teacher's shape at another width; what is not given follows from it."""
    width = given.get("hidden_size", round(teacher.hidden_size * heads / teacher.heads))
    kv_heads = teacher.kv_heads
    if kv_heads is not None:
        wanted = max(1, round(heads * kv_heads / teacher.heads))
        kv_heads = max(count for count in range(1, wanted + 1) if heads % count == 0)
    head_dim = teacher.head_dim
    if head_dim is not None and head_dim * teacher.heads == teacher.hidden_size:
        head_dim = width // heads
    feed_forward = teacher.intermediate_size
    if feed_forward is not None and width != teacher.hidden_size:
        feed_forward = _scaled(feed_forward, width / teacher.hidden_size)
    shape = _Shape(teacher.layers, width, heads, kv_heads, head_dim, feed_forward)
    return replace(shape, **given)


def _scaled(size: int, factor: float) -> int:
    """Rounded to what kernels like."""
    return max(8, round(size * factor / 8) * 8)


def _resized(config: PretrainedConfig, shape: _Shape) -> PretrainedConfig:
    """A copy of a config with other sizes, checked by its own class."""
    raw = config.to_dict()
    before = _shape_of(config)
    for field in fields(_Shape):
        value = getattr(shape, field.name)
        name = _name_in(config, field.name)
        if value != getattr(before, field.name) and name is None:
            raise ModelError(f"student: {field.name} cannot be set for a {config.model_type} model; leave it out")
        if name is not None:
            raw[name] = value
    for name in SCALED_WITH_WIDTH:
        if raw.get(name) == before.hidden_size:
            raw[name] = shape.hidden_size
        elif isinstance(raw.get(name), int) and shape.hidden_size != before.hidden_size:
            raw[name] = _scaled(raw[name], shape.hidden_size / before.hidden_size)
    if before.head_dim is not None and raw.get("query_pre_attn_scalar") == before.head_dim:
        raw["query_pre_attn_scalar"] = shape.head_dim
    _resize_lists(raw, before.layers, shape.layers)
    with _buildable(config):
        return type(config).from_dict(raw)


def _resize_lists(raw: dict[str, Any], before: int, after: int) -> None:
    """Lists with an entry per layer (``layer_types`` and the like) follow the number of layers."""
    for name, value in raw.items():
        if name in LISTS_OF_LAYERS and isinstance(value, list):
            raw[name] = [layer for layer in value if layer < after]
        elif isinstance(value, list) and len(value) == before and ("layer" in name or "block" in name):
            raw[name] = _resampled(value, after)
    if "attention_types" in raw and "attention_layers" in raw:  # GPT-Neo keeps the same list twice
        raw["attention_types"] = [[raw["attention_layers"], 1]]


def _resampled(values: list[Any], count: int) -> list[Any]:
    """``count`` entries of a per-layer list: its pattern repeated, or thinned evenly down to its last entry."""
    period = next(
        length
        for length in range(1, len(values) + 1)
        if all(value == values[index % length] for index, value in enumerate(values))
    )
    if count >= period:
        return [values[index % period] for index in range(count)]
    if count == 1:
        return [values[period - 1]]
    return [values[round(index * (period - 1) / (count - 1))] for index in range(count)]


def _search(config: PretrainedConfig, teacher: _Shape, given: dict[str, int], ratio: float) -> PretrainedConfig:
    """The best of one candidate a width: the deepest that fits."""
    budget = ratio * _count(config)
    shapes = [_widened(teacher, given, _heads_for(teacher, given))]
    if not {"hidden_size", "heads"} & given.keys():
        sizes = [{**given, "hidden_size": width} for width in _widths(teacher)]
        shapes = [_widened(teacher, size, _heads_for(teacher, size)) for size in sizes]
    deepest = [_deepest(config, shape, budget, fixed="layers" in given) for shape in shapes]
    found = [candidate for candidate in deepest if candidate is not None]
    if not found:
        raise ModelError(
            f"student: no model with scale {ratio} and the given sizes is small enough ({budget:,.0f} parameters); "
            "use a larger scale, or fewer fixed sizes (the embedding of the vocabulary does not shrink with depth)"
        )
    best = min(found, key=lambda candidate: 1 - candidate[0] / budget + _misproportion(teacher, candidate[1]))
    return _resized(config, best[1])


def _widths(teacher: _Shape) -> list[int]:
    """16 to 32 widths up to the teacher's, whole heads where its number of heads allows."""
    heads, width = teacher.heads, teacher.hidden_size
    whole = [n for n in range(16, 33) if width % n == 0 and (n % heads == 0 or heads % n == 0)]
    other = heads if width % heads == 0 else math.gcd(width, 32)
    count = min(whole, key=lambda n: abs(n - heads)) if whole else other
    return [width // count * n for n in range(1, count + 1)]


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


def _deepest(config: PretrainedConfig, shape: _Shape, budget: float, *, fixed: bool) -> tuple[int, _Shape] | None:
    """(parameters, shape) with as many layers as fit into the budget, from a line through two counts."""
    if fixed:
        count = _count(_resized(config, shape))
        return (count, shape) if count <= budget else None
    most = shape.layers
    counts = {1: _count(_resized(config, replace(shape, layers=1)))}
    if counts[1] > budget:
        return None
    counts[most] = _count(_resized(config, shape))
    per_layer = (counts[most] - counts[1]) / max(1, most - 1)
    layers = most if counts[most] <= budget else int(1 + (budget - counts[1]) / per_layer)
    for depth in range(min(most, layers + 1), 0, -1):  # layers may differ, so the line is only a start
        count = counts.get(depth) or _count(_resized(config, replace(shape, layers=depth)))
        if count <= budget:
            return count, replace(shape, layers=depth)
    return None


def _count(config: PretrainedConfig) -> int:
    """Parameters of a model of this config, built without memory for them."""
    from transformers import AutoModelForCausalLM

    with _buildable(config), torch.device("meta"):
        return parameter_count(AutoModelForCausalLM.from_config(config))


@contextmanager
def _buildable(config: PretrainedConfig) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"student: a {config.model_type} model cannot be built with these sizes ({_reason(error)}); change them"
        ) from error


# The head


class OutputHead(NamedTuple):
    """How a model turns what enters its head into logits.

    ``logits_BTV = cap(head(x) * logit_scale)``, with ``cap(z) = softcap * tanh(z / softcap)`` if there is one.
    ``path`` is the dotted path of the head in the model.
    """

    path: str
    softcap: float | None
    logit_scale: float


def output_head(model: PreTrainedModel) -> OutputHead:
    """Find the module that computes the logits, and what happens to them after it.

    Raises:
        ModelError: the model has no such module.
    """
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules(remove_duplicate=False) if module is head), None)
    if head is None or path is None:
        raise ModelError(
            f"{type(model).__name__} has no output head; use a causal language model, which has one (lm_head)"
        )
    config = _decoder_config(model.config)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((float(value) for name in caps if (value := getattr(config, name, None))), None)
    return OutputHead(path, softcap, _logit_scale(config))


def _logit_scale(config: PretrainedConfig) -> float:
    """What logits are multiplied by: Cohere multiplies, Granite divides, MiniCPM3 divides what enters the head."""
    kind = config.model_type
    if kind.startswith("cohere"):
        return float(config.logit_scale if config.logit_scale is not None else 1.0)
    if kind.startswith("granite") and getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    if kind.startswith("hyperclovax"):
        return float(config.logits_scaling)
    if kind == "falcon_h1":
        return float(config.lm_head_multiplier)
    return 1.0


@torch.no_grad()
def check_output_head(model: PreTrainedModel, head: OutputHead) -> None:
    """Make sure that ``head`` reproduces the model's own logits, on a few tokens.

    Raises:
        ModelError: it does not, so this architecture does something to its logits that is not known here.
    """
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(head.path).register_forward_hook(lambda module, args, output: seen.append(output))
    was_training = model.training
    try:
        ids_BT = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
        logits_BTV = model.eval()(input_ids=ids_BT).logits.float()
    finally:
        hook.remove()
        model.train(was_training)
    ours_BTV = seen[-1].float() * head.logit_scale if seen else torch.zeros(())
    if head.softcap is not None:
        ours_BTV = head.softcap * torch.tanh(ours_BTV / head.softcap)
    if ours_BTV.shape != logits_BTV.shape or not torch.allclose(ours_BTV, logits_BTV, rtol=2e-2, atol=2e-2):
        raise ModelError(
            f"{type(model).__name__}: its logits are not those of {head.path} with scale {head.logit_scale} and "
            f"softcap {head.softcap}; use a loss that reads the model's logits themselves"
        )
