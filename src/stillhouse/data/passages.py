"""Passages: windows of text that are scored and chosen, and what they are as text again.

Suffixes: N passages, T tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.base.errors import DataError
from stillhouse.data.encoding import encode_documents
from stillhouse.data.windows import WindowSplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

BROKEN = "\ufffd"  # what is left of a character that a passage cuts in two


def passage_texts(ids_NT: Tensor, tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    """The documents in every passage, in order, and which passage each is from; without special tokens."""
    texts, passages = [], []
    for number, row in enumerate(ids_NT.tolist()):
        piece: list[int] = []
        for token in [*row, tokenizer.eos_token_id]:
            if token != tokenizer.eos_token_id:
                piece.append(token)
                continue
            text = tokenizer.decode(piece, skip_special_tokens=True).strip(BROKEN) if piece else ""
            if text.strip():
                texts.append(text)
                passages.append(number)
            piece = []
    return texts, passages


def text_windows(texts: Sequence[str], tokenizer: Tokenizer, window: int, *, name: str) -> tuple[WindowSplit, int]:
    """Documents as one stream in the order given, each ended by EOS, cut into windows; and the bytes of its tokens.

    Raises:
        DataError: less than one window.
    """
    found = encode_documents(tokenizer, {"text": list(texts)})
    stream = np.concatenate([*found["input_ids"], np.zeros(0, np.int32)])
    sizes = np.concatenate([*found["sizes"], np.zeros(0, np.int32)])
    count = len(stream) // window
    if not count:
        raise DataError(f"{name}: {len(stream)} tokens do not fill one window of {window}; use a smaller window")
    ids_NT = torch.from_numpy(stream[: count * window].reshape(count, window).copy())
    return WindowSplit({"input_ids": ids_NT}), int(sizes[: count * window].reshape(count, window)[:, 1:].sum())


@dataclass(frozen=True)
class Junk:
    """What is mixed into clean passages to make the embedded corpus: shares of all of it.

    Attributes:
        copied: clean passages that the duplicates are copies of.
    """

    passages: int = 2200
    duplicates: float = 0.4
    noise: float = 0.3
    copied: int = 12
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Passages in a fixed random order.

    Attributes:
        ids: (N, T).
        kinds: what each passage is, where that is known.
        probes: passages of some kinds, to see what a model that reads few of them makes of them.
    """

    ids: Tensor
    kinds: list[str] | None = None
    probes: dict[str, WindowSplit] | None = None

    def take(self, positions: Any) -> Corpus:
        """Some of the passages, in the order of ``positions``."""
        places = torch.as_tensor(positions, dtype=torch.long)
        kinds = None if self.kinds is None else [self.kinds[place] for place in places.tolist()]
        return Corpus(self.ids[places], kinds, self.probes)


def shuffled(corpus: Corpus, *, seed: int = 0) -> Corpus:
    """The same passages in an order that depends on ``seed`` alone."""
    return corpus.take(torch.randperm(len(corpus.ids), generator=torch.Generator().manual_seed(seed)))


def with_junk(clean_NT: Tensor, texts: Iterable[str], tokenizer: Tokenizer, junk: Junk = Junk()) -> Corpus:
    """Clean passages among copies of a few others (trivial: any model learns them) and noise; not yet shuffled.

    Noise is words of ``texts``, drawn evenly. As many clean passages are drawn as their share asks for, all of them
    where they are fewer.
    """
    draw = random.Random(f"junk {junk.seed}")
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    N, T = clean_NT.shape

    def noise() -> list[int]:
        ids: list[int] = tokenizer(" ".join(draw.choices(words, k=T)), add_special_tokens=False)["input_ids"]
        return ids[:T]

    order = draw.sample(range(N), N)
    clean = round((1 - junk.duplicates - junk.noise) * junk.passages)
    copied, places = order[: junk.copied], order[junk.copied :][:clean]
    copies = draw.choices(copied, k=round(junk.duplicates * junk.passages))
    drawn = [noise() for _ in range(round(junk.noise * junk.passages))]
    kinds = ["clean"] * len(places) + ["duplicate"] * len(copies) + ["noise"] * len(drawn)
    ids_NT = torch.cat([clean_NT[places + copies].long(), torch.tensor(drawn)])
    return Corpus(ids_NT, kinds, {"duplicate": WindowSplit({"input_ids": clean_NT[copied]})})
