"""Weights of several fine-tuned models as one: linear merges of tensors, and of whole directories shard by shard.

All models descend from one ancestor: W = W_0 + sum_i c_i (W_i - W_0) (task arithmetic, Ilharco et al., 2023, arXiv
2212.04089). The weights of the models are c_i, that of the ancestor 1 - sum_i c_i.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.base.errors import ModelError
from stillhouse.models.errors import clear_errors
from stillhouse.models.loading import check_files, load_tokenizer, local_folder, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

COPIED = ("inv_freq",)  # tables that the config determines
WEIGHTLESS = {  # what may differ between models whose weights mean the same
    *("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings", "attention_dropout"),
    *("initializer_range", "max_window_layers", "use_sliding_window", "sliding_window", "use_mrope", "id2label"),
    *("label2id", "layer_types", "max_length", "chunk_size_feed_forward", "output_attentions", "return_dict"),
}


def balanced(share: float, alpha: float) -> tuple[float, float]:
    """Coefficients of two models that are first merged with each other, then with their ancestor.

    alpha (share W_1 + (1 - share) W_2) + (1 - alpha) W_0 (BAI, Zheng et al., 2025, arXiv 2509.00309) has the
    coefficients alpha share and alpha (1 - share).
    """
    return alpha * share, alpha * (1 - share)


def merge_tensor(ancestor: Tensor, others: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """W_0 + sum c (W - W_0), computed a precision higher; whole numbers are the ancestor's.

    Equal tensors give themselves whatever the coefficients are, and coefficients of 0 the ancestor, to the bit.
    """
    if not ancestor.is_floating_point():
        return ancestor.clone()
    wide = torch.float64 if ancestor.dtype in (torch.float32, torch.float64) else torch.float32
    start = ancestor.to(wide)
    total = start.clone()
    for other, coefficient in zip(others, coefficients, strict=True):
        total.add_(other.to(wide) - start, alpha=coefficient)
    return total.to(ancestor.dtype)


def merge_states(
    ancestor: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    """The same for state dicts of one architecture, of any module; tensors that are tied stay equal.

    Raises:
        ModelError: the models do not have the same tensors.
    """
    for number, other in enumerate(others, start=1):
        _same_tensors(
            "the ancestor",
            {name: tuple(t.shape) for name, t in ancestor.items()},
            f"model {number}",
            {name: tuple(t.shape) for name, t in other.items()},
        )
    return {
        name: tensor.clone()
        if name.endswith(COPIED)
        else merge_tensor(tensor, [other[name] for other in others], coefficients)
        for name, tensor in ancestor.items()
    }


def merge_directories(
    ancestor: str,
    others: Sequence[str],
    coefficients: Sequence[float],
    output: Path,
    *,
    dtype: str | torch.dtype | None = None,
    files_of: int = 0,
    special_tokens: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Merge ``transformers`` models in directories (or on the hub) into ``output``, one shard in memory at a time.

    Args:
        ancestor: the model all others were made from; its shards are those of the result.
        others, coefficients: the models, and how much of each one's change is taken.
        dtype: of the result; by default each tensor's own in the ancestor.
        files_of: which of ``others`` gives the tokenizer, the chat template and the generation settings; without
            others it is the ancestor.
        special_tokens: refuse models whose added tokens differ.

    Raises:
        ModelError: other architectures, tokenizers or tensors, in one line.
    """
    from safetensors.torch import save_file

    models = [_Saved(name, trust_remote_code=trust_remote_code) for name in (ancestor, *others)]
    first = models[0]
    for model in models[1:]:
        first.check_alike(model, special_tokens=special_tokens)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    output.mkdir(parents=True, exist_ok=True)
    shards = sorted(set(first.files.values()))
    total = 0
    for shard in shards:
        made = {}
        for name in (name for name, file in first.files.items() if file == shard):
            start, *rest = (model.tensor(name) for model in models)
            merged = start if name.endswith(COPIED) else merge_tensor(start, rest, coefficients)
            made[name] = merged.to(wanted) if wanted is not None and merged.is_floating_point() else merged
            total += made[name].numel() * made[name].element_size()
        save_file(made, output / shard.name, metadata={"format": "pt"})
    if len(shards) > 1 or shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total}, "weight_map": {n: f.name for n, f in first.files.items()}}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    giver = (models[1:] or models)[files_of]
    config = giver.config
    if wanted is not None:
        config.dtype = wanted
    config.save_pretrained(output)
    giver.tokenizer.save_pretrained(output)
    if (generation := giver.folder / "generation_config.json").is_file():
        shutil.copy(generation, output / generation.name)


class _Saved:
    """A model in a directory: where each of its tensors lies, its config and its tokenizer."""

    def __init__(self, name: str, *, trust_remote_code: bool) -> None:
        self.name = name
        self.folder = local_folder(name) or _downloaded(name)
        check_files(self.folder)
        self.config: PretrainedConfig = read_config(str(self.folder), trust_remote_code=trust_remote_code)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(
            name, self.folder, revision="main", trust_remote_code=trust_remote_code
        )
        from safetensors import safe_open

        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({self.folder / file for file in listed.values()})
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    if getattr(self.config, "tie_word_embeddings", False) and key.endswith("lm_head.weight"):
                        continue  # some save tied heads twice
                    self.files[key], self.shapes[key] = file, tuple(opened.get_slice(key).get_shape())

    def tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def check_alike(self, other: _Saved, *, special_tokens: bool) -> None:
        mine, theirs = (_meaning(model.config.to_dict()) for model in (self, other))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ModelError(
                    f"{other.name}: its {key} is {theirs.get(key)!r:.60}, that of {self.name} {mine.get(key)!r:.60}; "
                    "only models made from one ancestor can be merged"
                )
        _same_tensors(self.name, self.shapes, other.name, other.shapes)
        added = [set(model.tokenizer.get_added_vocab()) for model in (self, other)]
        mine, theirs = (model.tokenizer.get_vocab() for model in (self, other))
        if not special_tokens:
            mine, theirs = (
                {token: id for token, id in vocab.items() if token not in added[0] | added[1]}
                for vocab in (mine, theirs)
            )
        if mine != theirs:
            token = min(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
            advice = "; where only added tokens differ, set special_tokens=false" if special_tokens else ""
            raise ModelError(
                f"{other.name}: another tokenizer than {self.name} ({token!r} is {theirs.get(token)} and "
                f"{mine.get(token)}), so the rows of their embeddings are not the same tokens{advice or '; use others'}"
            )


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in WEIGHTLESS}


def _same_tensors(
    one: str, mine: Mapping[str, tuple[int, ...]], other: str, theirs: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            have = [f"of shape {shapes[name]}" if name in shapes else "missing" for shapes in (theirs, mine)]
            raise ModelError(
                f"{other}: its tensor {name} is {have[0]}, that of {one} {have[1]}; only models of one architecture "
                "and vocabulary can be merged"
            )


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    with clear_errors(name):
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]))
