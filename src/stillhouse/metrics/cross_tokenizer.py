"""Figures of language models with different tokenizers on the same text, and of several models together.

Shapes: N predicted tokens, C tokens of a chunk of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed, Turn
from stillhouse.losses.token_logprobs import Head
from stillhouse.models.causal_lm import output_head

CHUNK_LOGITS = 2**22  # logits of one model that exist at one time


@dataclass
class TextFigures:
    """Sums over the chunks of a text, and what follows from them."""

    nats: float = 0.0
    bytes: int = 0
    tokens: int = 0
    chunks: int = 0
    gaps: float = 0.0
    agreements: int = 0

    @property
    def bits_per_byte(self) -> float:
        """The model's code length for the text: comparable whatever the tokenizer."""
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def gap(self) -> float:
        """Mean difference to the teacher's log-likelihood of a chunk, nats."""
        return self.gaps / max(1, self.chunks)

    @property
    def agreement(self) -> float:
        """Share of places where both may begin a token and the likeliest ones begin alike."""
        return self.agreements / max(1, self.chunks)


@dataclass
class _Said:
    """What models say of the tokens of a batch, in the order of the text."""

    log_q: Tensor
    guess: Tensor  # likeliest tokens
    chunk: Tensor  # the chunk of each token, numbered through the batch

    @property
    def first(self) -> Tensor:
        """Which tokens are the first of their chunk."""
        return torch.cat([torch.ones_like(self.chunk[:1], dtype=torch.bool), self.chunk.diff() != 0])

    def chunks(self) -> Tensor:
        """Log-likelihoods of the chunks, in order."""
        place_N = self.first.cumsum(0) - 1
        count = int(place_N[-1]) + 1 if len(place_N) else 0
        return self.log_q.new_zeros(count).index_add(0, place_N, self.log_q)


class Ensemble:
    """One or several causal LMs of one tokenizer: the mean of their next-token probabilities."""

    def __init__(self, models: Sequence[nn.Module], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._members = []
        for model in models:
            found: Any = output_head(model)
            layer: Any = model.get_submodule(found.path)
            head = Head(
                layer.weight[:vocab_size],
                None if layer.bias is None else layer.bias[:vocab_size],
                found.logit_scale,
                found.softcap,
            )
            self._members.append((Observed(model).tap(found.path, of="input").detach(), head))

    @torch.no_grad()
    def read(self, text: Batch) -> _Said:
        """What they say together of the tokens that ``loss_mask`` names."""
        keep_BT = text["loss_mask"][:, 1:].bool()
        labels_N = text["input_ids"][:, 1:][keep_BT]
        hidden = [(Turn([signal]).read(signal, text)[:, :-1][keep_BT], head) for signal, head in self._members]
        log_q, guess = [], []
        size = max(1, CHUNK_LOGITS // self.vocab_size)
        for start in range(0, len(labels_N), size):
            rows = slice(start, start + size)
            log_q_MCV = torch.stack([head.logits(hidden_ND[rows]).log_softmax(-1) for hidden_ND, head in hidden])
            log_q_CV = log_q_MCV.logsumexp(0) - math.log(len(hidden))
            log_q.append(log_q_CV.gather(1, labels_N[rows, None])[:, 0])
            guess.append(log_q_CV.argmax(-1))
        row_BT = torch.arange(len(keep_BT), device=keep_BT.device)[:, None] * (keep_BT.shape[1] + 1)
        chunk_N = (row_BT + text["chunks"][:, 1:])[keep_BT]
        empty_N = labels_N.new_zeros(0)
        return _Said(
            torch.cat(log_q).double() if log_q else empty_N.double(), torch.cat(guess) if guess else empty_N, chunk_N
        )


Pieces = Sequence[bytes | None]


def compare_across_tokenizers(
    teacher: Ensemble,
    students: Mapping[str, Ensemble],
    batches: Iterable[Batch],
    *,
    pieces: tuple[Pieces, Pieces],
) -> dict[str, TextFigures]:
    """Figures of models on paired batches (`stillhouse.data.alignment`), the teacher's as ``"teacher"`` among them.

    ``pieces``: the bytes of the teacher's and of the students' tokens.
    """
    figures = {name: TextFigures() for name in ("teacher", *students)}
    for batch in batches:
        size = int(batch["bytes"].sum())
        theirs = teacher.read(batch["teacher"])
        for name, found in figures.items():
            said, known = (theirs, pieces[0]) if name == "teacher" else (students[name].read(batch), pieces[1])
            a_C, b_C = theirs.chunks(), said.chunks()
            found.nats -= float(said.log_q.sum())
            found.bytes += size
            found.tokens += len(said.log_q)
            found.chunks += len(a_C)
            found.gaps += float((a_C - b_C).abs().sum())
            guesses = zip(theirs.guess[theirs.first].tolist(), said.guess[said.first].tolist(), strict=True)
            found.agreements += sum(begin_alike(pieces[0][one], known[other]) for one, other in guesses)
    return figures


def begin_alike(one: bytes | None, other: bytes | None) -> bool:
    """Whether one token's bytes begin with the other's; special tokens (None) are alike among themselves."""
    if not one or not other:
        return one == other
    return one.startswith(other) or other.startswith(one)
