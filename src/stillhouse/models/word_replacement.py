"""More task text: words replaced by others that fit, as a masked language model or its embeddings see it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from stillhouse.base.errors import ModelError
from stillhouse.models.errors import clear_errors


def load_word_model(name: str) -> Any:
    """A masked language model with a trained head.

    Raises:
        ModelError: it has none.
    """
    from transformers import AutoModelForMaskedLM

    with clear_errors(name):
        model, report = AutoModelForMaskedLM.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ModelError(f"{name}: has no masked-language-model head to replace words by; set augment=0")
    return model.eval()


BEGINS = ("Ġ", "▁")
"""How byte-level and SentencePiece tokenizers mark the first token of a word."""


class WordReplacer:
    """Draws texts in which words are replaced (TinyBERT, Jiao et al., 2020, algorithm 1).

    A word of one token is replaced by one of the likeliest at its place once it is masked; a word of several by one of
    the words whose embeddings are nearest to the mean of its own.

    Args:
        model, tokenizer: a masked language model.
        candidates: how many words may take a word's place.
        rate: probability that a word is replaced.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, candidates: int = 15, rate: float = 0.4, length: int = 128
    ) -> None:
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.candidates, self.rate = candidates, rate
        self.known: dict[str, list[str]] = {}  # nearest words of words that are several tokens
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        marked = any(token.startswith(BEGINS) for token in tokens)  # tokens that begin a word say so
        special = set(tokenizer.all_special_ids)
        self.words: dict[int, str] = {}
        for number, token in enumerate(tokens):
            word = token.removeprefix(BEGINS[0]).removeprefix(BEGINS[1])
            if number not in special and word.isalpha() and (not marked or token.startswith(BEGINS)):
                self.words[number] = word

    def __call__(self, text: str, copies: int, draw: random.Random) -> list[str]:
        """So many changed copies of a text."""
        words = text.split()
        choices = self._choices(words)
        made = []
        for _ in range(copies):
            picked = [
                draw.choice(options) if options and draw.random() < self.rate else word
                for word, options in zip(words, choices, strict=True)
            ]
            made.append(" ".join(picked))
        return made

    @torch.no_grad()
    def _choices(self, words: Sequence[str]) -> list[list[str]]:
        mask = self.tokenizer.mask_token
        single = [len(self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in words]
        choices = [[] if one else self._neighbours(word) for word, one in zip(words, single, strict=True)]
        places = [place for place, one in enumerate(single) if one]
        if not places:
            return choices
        texts = [" ".join([*words[:place], mask, *words[place + 1 :]]) for place in places]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        logits = self.model(**encoded).logits
        at = encoded["input_ids"] == self.tokenizer.mask_token_id
        for row, place in enumerate(places):
            if at[row].any():  # else it was cut off
                choices[place] = self._best(logits[row][at[row]][0])
        return choices

    def _neighbours(self, word: str) -> list[str]:
        if word not in self.known:
            table = self.model.get_input_embeddings().weight
            pieces = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            if not pieces:
                return []
            mean = table[pieces].mean(0)
            self.known[word] = self._best(torch.cosine_similarity(table, mean[None], dim=-1))
        return self.known[word]

    def _best(self, scores: torch.Tensor) -> list[str]:
        """The words with the highest scores."""
        found: list[str] = []
        for number in scores.argsort(descending=True, stable=True).tolist():
            if number in self.words:
                found.append(self.words[number])
            if len(found) == self.candidates:
                break
        return found
