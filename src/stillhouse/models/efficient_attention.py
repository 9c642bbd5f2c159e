"""Encoders with efficient attention, converted from BERT or RoBERTa: Longformer, BigBird, Nystromformer, LSG.

`convert_encoder` copies all weights into the ``transformers`` class of that attention and repeats the position table
up to the new length, so the result is an ordinary model of its class; LSG, which ``transformers`` has not, is in
`stillhouse.models.lsg`. `shallow` keeps some layers of a model, of whatever attention; `encoder_cost` says what a model
costs at a length.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.base.errors import ModelError
from stillhouse.base.files import read_json
from stillhouse.models.errors import clear_errors, quiet
from stillhouse.models.lsg import IMPLEMENTATION, PREFIX, Sparse, check_lsg, lsg_classes

Attention = Literal["full", "longformer", "bigbird", "nystromformer", "lsg"]
SOURCES = {"bert": "bert", "roberta": "roberta"}
HEADS = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def reserved_positions(model: Any) -> int:
    """Rows of the position table before that of the first token: what RoBERTa, Longformer and Nystromformer keep."""
    kind = model.config.model_type
    if kind.endswith("roberta") or kind == "longformer":
        return int(model.config.pad_token_id) + 1
    return 2 if kind == "nystromformer" else 0


def tile_positions(table_PD: Tensor, count: int, *, trained: int | None = None) -> Tensor:
    """``count`` rows that repeat the first ``trained`` ones (all by default): row trained + i is row i.

    As Longformer's authors extend RoBERTa from 512 to 4,096 positions (Beltagy et al., 2020, arXiv 2004.05150).
    """
    known_PD = table_PD[:trained]
    return known_PD.repeat(-(-count // len(known_PD)), 1)[:count]


def alternate_layers(layers: int, count: int) -> list[int]:
    """The layers a student of ``count`` layers starts from, evenly apart: [0, 2, 4, 6, 8, 10] of 12 for 6."""
    if not 1 <= count <= layers:
        raise ModelError(f"a student of {count} layers cannot take them from a teacher of {layers}")
    return [index * layers // count for index in range(count)]


def convert_encoder(
    teacher: Any,
    attention: Attention,
    *,
    length: int,
    trained: int | None = None,
    window: int = 512,
    block: int = 64,
    random_blocks: int = 3,
    landmarks: int = 64,
    factor: int = 2,
    selection: Sparse = "norm",
    global_ids: Sequence[int] = (),
) -> Any:
    """A masked language model with another attention and ``length`` positions, with the weights of ``teacher``.

    Longformer's projections of global tokens start as copies of the local ones; Nystromformer's convolution starts at
    zero, so that nothing but the approximation of the softmax is new. LSG's global tokens start as embeddings of words
    that stand at positions 0, 1, and so on.

    Args:
        teacher: a ``BertForMaskedLM`` or ``RobertaForMaskedLM``.
        attention: ``full`` makes the positions longer and leaves the rest.
        trained: positions that the teacher was trained with, if its table has more.
        window: Longformer: a token sees half of so many tokens on either side.
        block: BigBird and LSG: tokens of a block.
        random_blocks: BigBird: blocks that each one sees by chance.
        landmarks: Nystromformer: means of segments that stand for queries and keys.
        factor, selection: LSG: how many tokens are read beyond the blocks beside one's own, and which.
        global_ids: LSG: the words that its global tokens start from; as many as there are.

    Raises:
        ModelError: a model of another kind, or a length that the attention cannot be cut into.
    """
    import transformers

    kind, config = teacher.config.model_type, teacher.config
    if kind not in SOURCES or not hasattr(teacher, "get_output_embeddings") or teacher.get_output_embeddings() is None:
        raise ModelError(f"a {kind} model cannot be converted; give a BERT or RoBERTa with its masked-token head")
    common = {name: getattr(config, name) for name in SHARED if getattr(config, name, None) is not None}
    _divides(attention, length, {"longformer": window, "bigbird": block, "nystromformer": landmarks}.get(attention, 1))
    extra: dict[str, Any] = {}
    config_class: Any = None
    if attention == "full":
        name, extra = {"bert": "Bert", "roberta": "Roberta"}[kind], {}
    elif attention == "lsg":
        check_lsg(block=block, factor=factor, selection=selection)
        name, classes = {"bert": "Bert", "roberta": "Roberta"}[kind], lsg_classes(kind)
        config_class, model_class = classes["Config"], classes["ForMaskedLM"]
        extra = {"block": block, "factor": factor, "selection": selection, "global_tokens": len(global_ids)}
        extra = {"lsg": extra}
    elif attention == "longformer":
        name, extra = "Longformer", {"attention_window": [window] * config.num_hidden_layers}
    elif attention == "bigbird":
        name, common["sep_token_id"] = "BigBird", None
        extra = {"attention_type": "block_sparse", "block_size": block, "num_random_blocks": random_blocks}
        if length <= (5 + 2 * random_blocks) * block:
            raise ModelError(
                f"length={length}: BigBird's pattern needs more than {(5 + 2 * random_blocks) * block} tokens with "
                f"blocks of {block}; choose smaller or fewer blocks"
            )
    else:
        name, extra = "Nystromformer", {"num_landmarks": landmarks, "segment_means_seq_len": length}
    before = teacher.config.pad_token_id + 1 if name in ("Roberta", "Longformer") else 0
    if config_class is None:
        config_class, model_class = (getattr(transformers, name + part) for part in ("Config", "ForMaskedLM"))
    made = config_class(**common, max_position_embeddings=length + before, **extra)
    with torch.random.fork_rng(devices=[]), quiet():
        model = model_class(made)
    _carry(teacher, model, length, trained, global_ids)
    return mended(model.to(next(teacher.parameters()).dtype).eval())


def shallow(model: Any, layers: Sequence[int], *, seed: int | None = None) -> Any:
    """``model`` with the given layers only; with a ``seed``, of that shape but with random weights."""
    raw = model.config.to_dict() | {"num_hidden_layers": len(layers)}
    if isinstance(raw.get("attention_window"), list):
        raw["attention_window"] = [raw["attention_window"][index] for index in layers]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed or 0)
        student = type(model)(type(model.config).from_dict(raw))
    if seed is None:
        place = f"{model.base_model_prefix}.encoder.layer."
        moved = {f"{place}{new}.": f"{place}{old}." for new, old in enumerate(layers)}
        found = model.state_dict()
        wanted = {}
        for name in student.state_dict():
            start = next((start for start in moved if name.startswith(start)), "")
            wanted[name] = found[moved.get(start, "") + name.removeprefix(start)]
        student.load_state_dict(wanted)
    return mended(student.to(next(model.parameters()).dtype).eval())


def token_classifier(model: Any, labels: Sequence[str], *, seed: int) -> Any:
    """A tagger that begins with the encoder of a masked language model; its last layer is new, fixed by ``seed``."""
    import transformers

    if model.config.model_type.startswith(PREFIX):
        kind = lsg_classes(model.config.model_type.removeprefix(PREFIX))["ForTokenClassification"]
    else:
        kind = getattr(transformers, type(model).__name__.replace("ForMaskedLM", "ForTokenClassification"))
    raw = model.config.to_dict() | {"architectures": None}
    raw |= {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    raw.pop("num_labels", None)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        made = kind(type(model.config).from_dict(raw))
    base = getattr(model, model.base_model_prefix).state_dict()
    getattr(made, made.base_model_prefix).load_state_dict(base, strict=False)
    return mended(made.eval())


def load_efficient(folder: str | Path, *, tagger: bool = False) -> Any:
    """A masked language model, or a tagger, of any of these kinds of attention, in float32 and eval mode."""
    from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if tagger else AutoModelForMaskedLM
    register_lsg(folder)
    with clear_errors(str(folder)):
        model, report = auto.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    missing = [name for name in report["missing_keys"] if "pooler" not in name]
    if missing:
        raise ModelError(f"{folder}: weights are missing (first: {min(missing)}); save the model again")
    return mended(model.eval())


def register_lsg(folder: str | Path) -> None:
    """Let the Auto classes load the LSG model in ``folder``, in this process; nothing happens for another model."""
    path = Path(folder) / "config.json"
    kind = str(read_json(path).get("model_type")) if path.is_file() else ""
    if kind.startswith(PREFIX) and kind.removeprefix(PREFIX) in SOURCES:
        lsg_classes(kind.removeprefix(PREFIX))


def mended(model: Any) -> Any:
    """Let Nystromformer read padded texts: its attention takes a mask (B, 1, 1, T), and is given (B, 1, T, T)."""
    for part in model.modules():
        if type(part).__name__ == "NystromformerSelfAttention":
            part.register_forward_pre_hook(_one_row, with_kwargs=True)
    return model


def _one_row(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = [one[..., :1, :] if isinstance(one, Tensor) and one.ndim == 4 else one for one in args]
    mask = kwargs.get("attention_mask")
    return tuple(given), kwargs if mask is None else {**kwargs, "attention_mask": mask[..., :1, :]}


def last_layer(model: Any) -> str:
    """The path of the last layer, whose output are the last hidden states."""
    return f"{model.base_model_prefix}.encoder.layer.{model.config.num_hidden_layers - 1}"


# -- what it costs --------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoder_cost(model: Any, length: int, *, rounds: int = 3) -> dict[str, float]:
    """``flops`` (counted), ``milliseconds`` (the best of some forwards) and ``peak_bytes`` for one text of ``length``.

    ``peak_bytes`` are the most bytes of tensors that one forward holds at a time, parameters left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    ids = torch.arange(length, device=device)[None] % (model.config.vocab_size - 1) + 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "longformer":
        batch["global_attention_mask"] = (torch.arange(length, device=device) == 0).long()[None]
    model.eval()
    with _at_length(model, length), quiet():
        with _counted_attention(model), FlopCounterMode(display=False) as counter:
            model(**batch)
        memory = PeakTensors()
        with memory:
            model(**batch)
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            model(**batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return {"flops": float(counter.get_total_flops()), "milliseconds": 1e3 * min(times), "peak_bytes": memory.peak}


class PeakTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and the most of them at a time (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.held = 0
        self.peak = 0.0
        gc.collect()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self.alive:
                self.alive[id(storage)] = storage.nbytes()
                self.held += storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage))
        self.peak = max(self.peak, float(self.held))
        return made

    def _gone(self, key: int) -> None:
        self.held -= self.alive.pop(key, 0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def _at_length(model: Any, length: int) -> Any:
    """Let a model read a text of ``length``: Nystromformer is built for one, BigBird turns to full attention."""
    segmented = [part for part in model.modules() if hasattr(part, "seq_len") and hasattr(part, "num_landmarks")]
    before = [part.seq_len for part in segmented]
    base = getattr(model, model.base_model_prefix)
    attention = getattr(base, "attention_type", None)
    for part in segmented:
        part.seq_len = length
    try:
        yield
    finally:
        for part, size in zip(segmented, before, strict=True):
            part.seq_len = size
        if attention is not None and base.attention_type != attention:
            base.set_attention_type(attention)


@contextmanager
def _counted_attention(model: Any) -> Any:
    """Fused attention on a CPU is not counted: let it be done step by step."""
    before = model.config._attn_implementation
    change = before not in (None, "eager", IMPLEMENTATION)
    if change:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if change:
            model.set_attn_implementation(before)


# -- carrying weights over ------------------------------------------------------------------------------------------


def _divides(attention: str, length: int, part: int) -> None:
    if attention not in get_args(Attention):
        raise ModelError(f"attention={attention!r}: must be one of {', '.join(get_args(Attention))}")
    if length % part:
        raise ModelError(f"length={length}: must be a multiple of {part} for {attention}")


@torch.no_grad()
def _carry(teacher: Any, model: Any, length: int, trained: int | None, global_ids: Sequence[int]) -> None:
    found = _neutral(teacher)
    table, offset = "embeddings.position_embeddings.weight", reserved_positions(model)
    known = found[table][reserved_positions(teacher) :]
    if trained is not None and not 1 <= trained <= len(known):
        raise ModelError(f"trained={trained}: the teacher has {len(known)} positions")
    wanted = {}
    for name, own in model.state_dict().items():
        plain = _plain(name, model.base_model_prefix)
        local = plain.replace("_global.", ".")
        if plain == table:
            # Rows that stand for no position stay as they are.
            wanted[name] = torch.cat([own[:offset], tile_positions(known, length, trained=trained).to(own)])
        elif plain == "embeddings.LayerNorm.global_tokens":
            first = found["embeddings.token_type_embeddings.weight"][0]
            places = tile_positions(known, len(global_ids), trained=trained)
            wanted[name] = found["embeddings.word_embeddings.weight"][list(global_ids)] + places + first
        elif plain in found:
            wanted[name] = found[plain]
        elif local in found:
            wanted[name] = found[local].clone()
        elif ".conv." in plain:
            wanted[name] = torch.zeros_like(own)
        elif plain.startswith("pooler."):
            wanted[name] = own  # not part of a masked language model
        else:
            raise ModelError(f"{type(teacher).__name__}: nothing to put into {name}; this model cannot be converted")
    model.load_state_dict(wanted)
    model.tie_weights()


def _neutral(model: Any) -> dict[str, Tensor]:
    """A model's tensors by names that do not depend on its class."""
    return {_plain(name, model.base_model_prefix): tensor for name, tensor in model.state_dict().items()}


def _plain(name: str, prefix: str) -> str:
    for one, other in HEADS.items():
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name.removeprefix(f"{prefix}.")


def parts_of(model: nn.Module) -> int:
    """Parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
