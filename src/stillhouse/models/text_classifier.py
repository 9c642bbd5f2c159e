"""Text classifiers of ``transformers``: load them, put a new head on an encoder, make small ones, encode text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stillhouse.base.errors import ModelError, suggest
from stillhouse.models.errors import clear_errors, quiet
from stillhouse.models.loading import check_config_file, local_folder

HEADS = ("classifier", "score", "pooler", "pre_classifier", "summary", "logits_proj", "dense", "out_proj")
"""Modules of a classifier that an encoder alone does not have, by a part of their names."""


def load_text_classifier(
    name: str, *, classes: Sequence[str] | None = None, seed: int | None = None, trust_remote_code: bool = False
) -> Any:
    """A classifier from a directory or the hub, from safetensors only, in float32 and eval mode.

    Args:
        classes: the classes it is to tell apart, or () for one number to predict; None: those it was saved with.
        seed: an encoder without a head, or with one for other classes, gets a new one, drawn by this seed; None refuses
            such a model.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = local_folder(name)
    if folder is not None:
        check_config_file(folder, trust_remote_code=trust_remote_code)
    with clear_errors(name):
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=trust_remote_code)
    if classes is not None:
        config = with_labels(config, classes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        with clear_errors(name):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder or name,
                config=config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # looked at below
                output_loading_info=True,
            )
    new = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    body = [key for key in new if not any(part in HEADS for part in key.split("."))]
    if body:
        raise ModelError(
            f"{name}: weights and config.json do not fit: {len(body)} tensors are missing, such as {body[0]}"
        )
    if new and seed is None:
        raise ModelError(
            f"{name}: has no trained head for these labels (new: {new[0]}); give a model that was fine-tuned on them"
        )
    return model.eval()


def new_text_classifier(config: Any, *, seed: int) -> Any:
    """A classifier with random weights that depend on ``seed`` only; no global random state moves."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(config), dtype=torch.float32)


def with_labels(config: Any, classes: Sequence[str]) -> Any:
    """A copy of a config with these classes; without any, one number is predicted."""
    changed = copy.deepcopy(config)
    names = list(classes) or ["score"]
    changed.id2label = dict(enumerate(names))
    changed.label2id = {name: number for number, name in enumerate(names)}
    changed.problem_type = "single_label_classification" if classes else "regression"
    return changed


def smaller_config(config: Any, sizes: str) -> Any:
    """A config with other sizes: ``layers=4,hidden_size=312,intermediate_size=1200``; ``heads`` is understood too.

    Raises:
        ModelError: naming the part of the line that is wrong.
    """
    short = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
    changed = copy.deepcopy(config)
    for part in sizes.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        name = short.get(name, name)
        if not value.isdigit() or int(value) < 1 or not hasattr(changed, name):
            known = [key for key, held in changed.to_dict().items() if type(held) is int]
            raise ModelError(f"student {sizes!r}: {part!r}: write layers=4,hidden_size=312{suggest(name, known)}")
        setattr(changed, name, int(value))
    if changed.hidden_size % changed.num_attention_heads:
        raise ModelError(
            f"student {sizes!r}: {changed.num_attention_heads} heads do not divide a hidden size of "
            f"{changed.hidden_size}; set heads or hidden_size"
        )
    return changed


def text_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of an encoder; one that puts no special tokens around a text is made to.

    Raises:
        ModelError: it cannot be loaded, or cannot pad.
    """
    from transformers import AutoTokenizer

    with clear_errors(f"{name} (its tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name,
            trust_remote_code=trust_remote_code,
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no padding token; set one (tokenizer.pad_token) and save it")
    end = tokenizer.sep_token or tokenizer.eos_token
    if tokenizer.is_fast and not tokenizer.num_special_tokens_to_add() and end is not None:
        _put_around(tokenizer, tokenizer.cls_token or tokenizer.bos_token or end, end)
    return tokenizer


def _put_around(tokenizer: Any, begin: str, end: str) -> None:
    from tokenizers.processors import TemplateProcessing

    numbers = dict.fromkeys((begin, end))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in numbers],
    )


def encode_texts(tokenizer: Any, first: list[str], second: list[str] | None, *, length: int) -> dict[str, torch.Tensor]:
    """Texts, or pairs, as padded columns (N, T): ``input_ids``, ``attention_mask`` and what else the model takes."""
    encoded = tokenizer(first, second, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {name: column.to(torch.int32) for name, column in encoded.items()}


def encode_pieces(tokenizer: Any, texts: Sequence[str], *, length: int) -> dict[str, torch.Tensor]:
    """Unlabelled texts as padded columns (N, T); long ones in several pieces of at most ``length`` tokens."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=length, return_overflowing_tokens=True,
        return_tensors="pt",
    )  # fmt: skip
    encoded.pop("overflow_to_sample_mapping", None)
    return {name: column.to(torch.int32) for name, column in encoded.items()}
