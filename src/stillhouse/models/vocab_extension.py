"""A larger vocabulary for a tokenizer: the tokens of another one, or a list of them.

MiniMA adapts LLaMA to Chinese so before it distils (Zhang et al., 2025, arXiv 2311.07052). For what models do with the
new ids see `stillhouse.models.tokenizer_transfer.transplant`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.base.errors import ModelError
from stillhouse.models.loading import load_tokenizer, local_folder
from stillhouse.models.tokenizers import real_vocab_size
from stillhouse.models.vocab_trimming import SPECIAL

Extension = tuple[Any, list[list[int]]]
"""A larger tokenizer, and for each of its ids the old ids that it stands for (itself, where it is old)."""


def extended_from(tokenizer: Any, source: str) -> Extension:
    """A tokenizer with more tokens: those of a ``.txt`` file, one a line, or those of another tokenizer.

    Raises:
        ModelError: no such file or tokenizer, nothing new in it, or a tokenizer that cannot be merged.
    """
    if source.endswith(".txt"):
        file = Path(source)
        if not file.is_file():
            raise ModelError(f"{source}: no such file of tokens; write one token a line")
        return with_tokens(tokenizer, file.read_text(encoding="utf-8").splitlines())
    other = load_tokenizer(source, local_folder(source), revision="main", trust_remote_code=False)
    return merged(tokenizer, other)


def with_tokens(tokenizer: Any, tokens: Sequence[str]) -> Extension:
    """``tokenizer`` with whole strings as new tokens, found wherever they stand in a text, the longest first.

    Raises:
        ModelError: it has all of them already, or could not read one back.
    """
    known, size = tokenizer.get_vocab(), real_vocab_size(tokenizer)
    new = [token for token in dict.fromkeys(tokens) if token.strip() and token not in known]
    if not new:
        raise ModelError("vocabulary: no token in it is new to the teacher's tokenizer; give others, or leave it out")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(new)
    for token in new:  # decoders of bytes take some letters (ü) of an added token for bytes
        if larger.decode(larger.convert_tokens_to_ids([token])).strip() != token.strip():
            raise ModelError(
                f"vocabulary: the token {token!r} would not be read back by this tokenizer; give a tokenizer"
            )
    made = tokenizer(new, add_special_tokens=False)["input_ids"]
    return larger, [[number] for number in range(size)] + made


def merged(tokenizer: Any, other: Any) -> Extension:
    """``tokenizer`` with the tokens of ``other`` that it lacks, put together after all of its own merges.

    Text without new tokens is cut as before. Every split of a new token into two known ones becomes a merge, so that
    it is found whichever parts come first; the order of ``other`` decides between new ones. For two BPE tokenizers of
    one kind (both of bytes, or both of characters).

    Raises:
        ModelError: they are of another kind, or nothing is new.
    """
    if not (getattr(tokenizer, "is_fast", False) and getattr(other, "is_fast", False)):
        raise ModelError("vocabulary: only fast tokenizers can be merged; give a .txt file of tokens instead")
    raw, theirs = (json.loads(one.backend_tokenizer.to_str()) for one in (tokenizer, other))
    kinds = [(one["model"].get("type"), "ByteLevel" in json.dumps(one["decoder"])) for one in (raw, theirs)]
    if kinds[0] != kinds[1] or kinds[0][0] != "BPE" or raw["model"].get("continuing_subword_prefix"):
        raise ModelError(
            "vocabulary: its tokenizer and the teacher's must both be BPE, of bytes or of characters; give a .txt file "
            "of tokens instead"
        )
    model, size = raw["model"], real_vocab_size(tokenizer)
    # Added tokens keep their ids only if the model knows them.
    vocab: dict[str, int] = model["vocab"] | {entry["content"]: entry["id"] for entry in raw["added_tokens"]}
    special = {entry["content"] for entry in theirs["added_tokens"]}
    ranked = sorted(theirs["model"]["vocab"], key=theirs["model"]["vocab"].__getitem__)
    new = [token for token in ranked if token not in vocab and token not in special]
    if not new:
        raise ModelError("vocabulary: no token in it is new to the teacher's tokenizer; give others, or leave it out")
    parts = [[number] for number in range(size)]
    parts += [[piece.id for piece in tokenizer.backend_tokenizer.model.tokenize(token)] for token in new]
    vocab |= {token: size + place for place, token in enumerate(new)}
    for token in new:
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        model["merges"] += [list(pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["vocab"] = vocab
    return _like(tokenizer, raw), parts


def _like(tokenizer: Any, raw: dict[str, Any]) -> Any:
    """A tokenizer around other rules, with everything else from ``tokenizer``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=False,
        **{name: token for name in SPECIAL if (token := getattr(tokenizer, name, None)) is not None},
    )
    made.chat_template = tokenizer.chat_template
    return made
