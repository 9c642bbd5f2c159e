"""Figures of language models: likelihood, agreement with a reference, calibration, speed.

Shapes: N predicted tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed, Turn
from stillhouse.metrics.calibration import Reliability
from stillhouse.models.causal_lm import output_head

CHUNK_LOGITS = 2**22  # logits of one model that exist at one time


@dataclass
class LanguageFigures:
    """Sums over the predicted tokens of a text, and what follows from them."""

    nats: float = 0.0
    tokens: int = 0
    hits: int = 0
    agreements: int = 0
    kl_nats: float = 0.0
    reverse_kl_nats: float = 0.0
    reliability: Reliability = field(default_factory=Reliability)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.loss))

    @property
    def agreement(self) -> float:
        """Share of tokens where the most likely next token is the reference's."""
        return self.agreements / max(1, self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of tokens where the most likely next token is the text's."""
        return self.hits / max(1, self.tokens)

    @property
    def kl(self) -> float:
        """Mean KL(reference || model), in nats a token."""
        return self.kl_nats / max(1, self.tokens)

    @property
    def reverse_kl(self) -> float:
        """Mean KL(model || reference), in nats a token."""
        return self.reverse_kl_nats / max(1, self.tokens)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        return self.loss / math.log(2) / bytes_per_token


class _Reader:
    """Log-probabilities of a causal LM, chunk by chunk, so that full logits are never held."""

    def __init__(self, model: nn.Module) -> None:
        head = output_head(model)
        self._module = model.get_submodule(head.path)
        self._softcap, self._scale = head.softcap, head.logit_scale
        self._hidden = Observed(model, frozen=False).tap(head.path, of="input").detach()

    def hidden(self, batch: Batch) -> Tensor:
        return Turn([self._hidden]).read(self._hidden, batch)[:, :-1].flatten(0, 1)

    def log_probabilities(self, hidden_ND: Tensor, vocab_size: int) -> Tensor:
        logits_NV = self._module(hidden_ND).float()[:, :vocab_size] * self._scale
        if self._softcap:
            logits_NV = self._softcap * torch.tanh(logits_NV / self._softcap)
        return logits_NV.log_softmax(-1)


@torch.no_grad()
def compare_causal_lms(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], *, vocab_size: int, reference: str | None = None
) -> dict[str, LanguageFigures]:
    """Figures of several causal LMs on the same batches, in one pass; agreement and KLs are against ``reference``.

    ``batches`` hold ``input_ids`` (B, T), and optionally ``loss_mask`` or ``attention_mask``. Models should be in
    evaluation mode.
    """
    figures = {name: LanguageFigures() for name in models}
    readers = {name: _Reader(model) for name, model in models.items()}
    for batch in batches:
        mask = batch.get("loss_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
        keep_N = mask[:, 1:].flatten().bool()
        labels_N = batch["input_ids"][:, 1:].flatten()[keep_N]
        hidden = {name: reader.hidden(batch)[keep_N] for name, reader in readers.items()}
        size = max(1, CHUNK_LOGITS // vocab_size)
        for start in range(0, len(labels_N), size):
            chunk = slice(start, start + size)
            logs = {name: reader.log_probabilities(hidden[name][chunk], vocab_size) for name, reader in readers.items()}
            for name, log_q_NV in logs.items():
                _add(figures[name], log_q_NV, labels_N[chunk], logs[reference] if reference else None)
    return figures


def _add(figures: LanguageFigures, log_q_NV: Tensor, labels_N: Tensor, log_p_NV: Tensor | None) -> None:
    best_N, guess_N = log_q_NV.max(-1)
    correct_N = guess_N == labels_N
    figures.nats -= log_q_NV.gather(1, labels_N[:, None]).double().sum().item()
    figures.tokens += len(labels_N)
    figures.hits += int(correct_N.sum())
    figures.reliability.add(best_N.exp(), correct_N)
    if log_p_NV is not None:
        figures.agreements += int((guess_N == log_p_NV.argmax(-1)).sum())
        difference_NV = log_p_NV - log_q_NV
        figures.kl_nats += (log_p_NV.exp() * difference_NV).double().sum().item()
        figures.reverse_kl_nats -= (log_q_NV.exp() * difference_NV).double().sum().item()


@torch.no_grad()
def tokens_per_second(model: Any, batch: Batch, *, seconds: float = 1.0) -> float:
    """Tokens a model reads per second (one forward with logits, best of the rounds that fit in ``seconds``)."""
    device = next(model.parameters()).device
    inputs = batch["input_ids"].to(device)
    best, begun = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        model(input_ids=inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return inputs.numel() / best
