"""A tokenizer for small languages made by code: one token a symbol, and the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def symbol_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """Tokens 0, 1, ... are the letters of ``symbols`` in their order, the one after them ends a text (and pads)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<end>"
    backend = Tokenizer(models.WordLevel({symbol: at for at, symbol in enumerate([*symbols, end])}, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end)
