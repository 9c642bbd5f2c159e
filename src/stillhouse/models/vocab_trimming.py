"""A smaller vocabulary for a model and its tokenizer: the tokens that some texts use.

(Abdaoui et al., 2020, arXiv 2010.05609; BiStil.) Works on the fast tokenizers of ``transformers``: byte-level and other
BPE, WordPiece, Unigram and word-level. Ids become consecutive; embeddings and output layers keep the rows that stay.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch

from stillhouse.base.errors import ModelError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


def used_tokens(tokenizer: Any, texts: Sequence[Iterable[str]], *, threshold: float = 1e-6) -> set[int]:
    """Ids of tokens with at least this probability in one of several texts, and of all special tokens."""
    kept = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for text in texts:
        counts: Counter[int] = Counter()
        documents = iter(text)
        while piece := list(islice(documents, 1000)):
            for ids in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]:
                counts.update(ids)
        total = counts.total()
        kept |= {token for token, count in counts.items() if count / total >= threshold}
    return kept


def trim_tokenizer(tokenizer: Any, keep: set[int]) -> tuple[Any, torch.Tensor]:
    """A tokenizer with the tokens ``keep`` and those it cannot do without, and their old ids (N,) by new id.

    BPE cannot do without single letters and the parts that kept tokens are merged from; Unigram not without ``<unk>``.

    Raises:
        ModelError: not a fast tokenizer, or of a kind that is not known here.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{type(tokenizer).__name__}: only fast tokenizers can be trimmed; load it with use_fast")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
    added = {entry["id"] for entry in raw["added_tokens"]}
    kept = set(keep) | added
    if kind == "Unigram":
        kept.add(model["unk_id"])
        pieces = dict(enumerate(model["vocab"]))
    elif kind in ("BPE", "WordPiece", "WordLevel"):
        pieces = {number: token for token, number in model["vocab"].items()}
        if model.get("unk_token") in model["vocab"]:
            kept.add(model["vocab"][model["unk_token"]])
    else:
        raise ModelError(f"a {kind} tokenizer cannot be trimmed; BPE, WordPiece, Unigram and word-level ones can")
    if kind == "BPE":
        kept = _with_parts(model, kept)
    old = sorted(kept)
    new = {number: place for place, number in enumerate(old)}
    inside = [number for number in old if number in pieces]
    if kind == "Unigram":
        if [new[number] for number in inside] != list(range(len(inside))):
            raise ModelError("a Unigram tokenizer with added tokens before its own cannot be trimmed")
        model["vocab"] = [pieces[number] for number in inside]
        model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {pieces[number]: new[number] for number in inside}
    for entry in raw["added_tokens"]:
        entry["id"] = new[entry["id"]]
    if raw.get("post_processor"):
        raw["post_processor"] = _renumbered(raw["post_processor"], new)
    if raw.get("padding"):
        raw["padding"]["pad_id"] = new[raw["padding"]["pad_id"]]
    names = {name: token for name in SPECIAL if (token := getattr(tokenizer, name, None)) is not None}
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=False,
        **names,
    )
    return trimmed, torch.tensor(old)


def _with_parts(model: dict[str, Any], kept: set[int]) -> set[int]:
    """The kept tokens of a BPE, its letters, and what kept tokens are merged from; merges of other tokens go."""
    numbers = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    prefix = model.get("continuing_subword_prefix") or ""
    made = ["".join((left, right.removeprefix(prefix))) for left, right in pairs]
    kept = kept | {numbers[token] for token in set(numbers) - set(made)}
    for (left, right), whole in reversed(list(zip(pairs, made, strict=True))):  # later merges are made of earlier ones
        if numbers.get(whole) in kept:
            kept |= {numbers[left], numbers[right]}
    model["merges"] = [list(pair) for pair, whole in zip(pairs, made, strict=True) if numbers.get(whole) in kept]
    return kept


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    """A post-processor with its special tokens' new ids."""
    if isinstance(part, list):
        return [_renumbered(one, new) for one in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _renumbered(value, new) for key, value in part.items()}
    for key in ("sep", "cls"):  # of BERT's and RoBERTa's: a pair of token and id
        if isinstance(part.get(key), list) and len(part[key]) == 2 and isinstance(part[key][1], int):
            changed[key] = [part[key][0], new[part[key][1]]]
    if isinstance(part.get("ids"), list) and "tokens" in part:  # of templates
        changed["ids"] = [new[number] for number in part["ids"]]
    return changed


def cut_down(model: Any, old_ids: torch.Tensor, *, layers: Sequence[int], tokenizer: Any) -> Any:
    """A model with the rows ``old_ids`` of its vocabulary and some of its layers (counted from 0), in that order.

    Width, heads and everything else are copied; there is no dropout. ``tokenizer``, the trimmed one, says where the
    special tokens are.
    """
    config = copy.deepcopy(model.config)
    size, config.vocab_size, config.num_hidden_layers = model.config.vocab_size, len(old_ids), len(layers)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        made = type(model)(config)
    source = model.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            wide = source[re.sub(r"(\.layer\.)(\d+)\.", lambda found: f"{found[1]}{layers[int(found[2])]}.", name)]
            if wide.shape != tensor.shape and wide.shape[:1] == (size,):
                wide = wide[old_ids]
            tensor.copy_(wide)
    return made.eval()


def inherited_layers(count: int, factor: int, *, which: str = "regular") -> list[int]:
    """Which layers (from 0) a student of ``count / factor`` layers begins as: every ``factor``-th, or the lowest.

    Raises:
        ModelError: the factor does not divide the layers.
    """
    if count % factor:
        raise ModelError(f"{count} layers cannot be reduced by a factor of {factor}; choose a divisor")
    kept = count // factor
    return [(place + 1) * factor - 1 for place in range(kept)] if which == "regular" else list(range(kept))
