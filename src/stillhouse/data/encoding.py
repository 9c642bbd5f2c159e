"""From documents and conversations to tokens: ids, the bytes each stands for, and a mask on responses.

The functions of batches are made for ``datasets.Dataset.map``.
"""

from __future__ import annotations

import hashlib
import json
import os
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.base.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

PIECE = 1 << 16  # characters; longer documents are tokenised in pieces, so that memory stays bounded
GROUP = 32  # pieces given to the tokenizer at once

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: ``### User:``, the text, ``### Assistant:``, the text, EOS."""

Turns = list[dict[str, str]]


def digest(*parts: Any) -> str:
    """sha256 (hex) of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of everything in a fast tokenizer that decides which ids a text gets."""
    known = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return digest(known, tokenizer.chat_template, tokenizer.special_tokens_map, _lead(tokenizer))


def _lead(tokenizer: Tokenizer) -> list[int]:
    """The BOS id, for tokenizers that themselves put it before a text; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _locate(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each text: ids, where each token ends (characters), and the UTF-8 bytes it stands for.

    A token ends where its offset says and begins where the one before ended: tokens that share a character (bytes of
    an emoji) and blanks that offsets leave out then count once. Special tokens stand for no bytes.
    """
    called = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special, located = set(tokenizer.all_special_ids), []
    for text, ids, offsets in zip(texts, called["input_ids"], called["offset_mapping"], strict=True):
        characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (characters >= 0x80).astype(np.int64) + (characters >= 0x800) + (characters >= 0x10000)
        ends = np.maximum.accumulate(np.array(offsets, dtype=np.int32).reshape(-1, 2)[:, 1])
        sizes = np.diff(np.append(0, np.cumsum(widths))[ends], prepend=0)
        sizes[[token in special for token in ids]] = 0
        located.append((np.array(ids, dtype=np.int32), ends, sizes.astype(np.int32)))
    return located


# Documents


def encode_documents(tokenizer: Tokenizer, batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
    """``input_ids`` of every document with BOS and EOS, and ``sizes`` (bytes of every token); an empty one has none."""
    split = [_pieces(text) for text in batch["text"]]
    pieces = [piece for of_one in split for piece in of_one]
    groups = (pieces[start : start + GROUP] for start in range(0, len(pieces), GROUP))
    located = (one for group in groups for one in _locate(tokenizer, group))
    before, after = np.array(_lead(tokenizer), np.int32), np.array([tokenizer.eos_token_id], np.int32)
    rows: dict[str, list[np.ndarray]] = {"input_ids": [], "sizes": []}
    for text, of_one in zip(batch["text"], split, strict=True):
        ids, _, sizes = zip(*islice(located, len(of_one)), strict=True)
        rows["input_ids"].append(np.concatenate([before, *ids, after])[: None if text else 0])
        rows["sizes"].append(np.concatenate([0 * before, *sizes, 0 * after])[: None if text else 0])
    return rows


def _pieces(text: str) -> list[str]:
    """A text in pieces that end with a line where they can."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


# Conversations

CHAT_COLUMNS = {
    "input_ids": "int32",
    "attention_mask": "uint8",
    "loss_mask": "uint8",
    "sizes": "int32",
    "truncated": "uint8",
    "document": "int32",
}
"""What :func:`encode_conversations` gives: column -> type of the numbers in it."""


def encode_conversations(
    tokenizer: Tokenizer, name: str, T: int, batch: dict[str, list[Any]], indices: list[int]
) -> dict[str, list[np.ndarray]]:
    """Conversations in windows of T tokens, those without a response in their window left out.

    Returns:
        ``input_ids``, ``attention_mask``, ``loss_mask`` and ``sizes`` (bytes of a predicted token), padded at the
        right, ``truncated`` (1 if the end did not fit) and ``document`` (its index).
    """
    pairs = zip(batch.get("prompt", []), batch.get("completion", []), strict=True)
    conversations = batch.get("messages") or [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in pairs
    ]
    rendered = [
        _render(tokenizer, turns, f"{name} record {index + 1}")
        for turns, index in zip(conversations, indices, strict=True)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows: dict[str, list[np.ndarray]] = {name: [] for name in CHAT_COLUMNS}
    for (ids, ends, sizes), (_, spans), index in zip(
        _locate(tokenizer, [text for text, _ in rendered]), rendered, indices, strict=True
    ):
        loss_mask = np.zeros(len(ids), dtype=np.uint8)
        for start, end in spans:
            loss_mask[(ends > start) & (ends <= end)] = 1
        if not loss_mask[1:T].any():
            continue
        padded = {"input_ids": ids, "attention_mask": np.ones_like(loss_mask), "loss_mask": loss_mask, "sizes": sizes}
        for column, values in padded.items():
            fill = pad if column == "input_ids" else 0
            rows[column].append(np.pad(values[:T], (0, max(0, T - len(ids))), constant_values=fill))
        rows["truncated"].append(np.array([len(ids) > T]))
        rows["document"].append(np.array([index]))
    return rows


def _render(tokenizer: Tokenizer, turns: Turns, where: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and from where to where each response goes, end marker included.

    A template may write earlier turns differently once later ones follow (some leave out earlier reasoning); a
    response that is not found again in the whole text counts as context.
    """
    whole, spans = _apply_template(tokenizer, turns, where), []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and number > 0:
            before = _apply_template(tokenizer, turns[:number], where)
            upto = _apply_template(tokenizer, turns[: number + 1], where) if number + 1 < len(turns) else whole
            if whole.startswith(before) and whole.startswith(upto):
                asked = _apply_template(tokenizer, turns[:number], where, add_generation_prompt=True)
                start = len(os.path.commonprefix([whole, asked]))  # noqa: RUF071  characters are meant
                spans.append((start, len(upto.rstrip())))
    return whole, spans


def _apply_template(tokenizer: Tokenizer, turns: Turns, where: str, *, add_generation_prompt: bool = False) -> str:
    fallback = ("{{ bos_token }}" if _lead(tokenizer) else "") + FALLBACK_TEMPLATE
    template = None if tokenizer.chat_template else fallback
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where}: the tokenizer's chat template refuses this conversation ({reason}); change the record, or use "
            "another tokenizer"
        ) from error
