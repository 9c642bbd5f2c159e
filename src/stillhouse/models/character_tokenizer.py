"""A tokenizer whose tokens are given characters: for small languages made by code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character, in the order given, and one for the end, which also stands for any other character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    numbers = {character: number for number, character in enumerate(dict.fromkeys(characters))}
    backend = Tokenizer(models.WordLevel({**numbers, end: len(numbers)}, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end)
