"""How far a language model's confidence can be trusted, and the re-scaling that makes a teacher's most trusted.

Shapes: N predicted tokens that count, K kept tokens, M outcomes, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed
from stillhouse.losses.concentrated import Rescale
from stillhouse.losses.token_logprobs import Head, in_chunks
from stillhouse.metrics.calibration import Reliability
from stillhouse.models.causal_lm import output_head


class Likeliest(NamedTuple):
    """A model's likeliest tokens at every place: ``tokens`` and ``log_p`` (N, K), ``log_rest`` and ``labels`` (N)."""

    tokens: Tensor
    log_p: Tensor
    log_rest: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the likeliest token is the text's: (N)."""
        return self.tokens[:, 0] == self.labels


@torch.no_grad()
def likeliest(model: nn.Module, batches: Iterable[Batch], *, k: int, vocab_size: int) -> Likeliest:
    """The ``k`` likeliest tokens of a causal LM on the predicted tokens of ``batches``; full logits are never held.

    ``batches`` hold ``input_ids`` (B, T), and optionally ``loss_mask`` or ``attention_mask``.
    """
    found = output_head(model)
    layer = model.get_submodule(found.path)
    head = Head(layer.weight, layer.bias, found.logit_scale, found.softcap)  # type: ignore[arg-type]
    hidden = Observed(model).tap(found.path, of="input").detach()
    model.eval()

    def top(hidden_ND: Tensor) -> Tensor:
        log_q_NV = head.logits(hidden_ND)[:, :vocab_size].log_softmax(-1)
        log_p_NK, tokens_NK = log_q_NV.topk(k, -1)
        log_rest_N1 = log_q_NV.scatter(-1, tokens_NK, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([tokens_NK.double(), log_p_NK.double(), log_rest_N1.double()], -1)

    rows, labels = [], []
    for batch in batches:
        mask = batch.get("loss_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
        keep_N = mask[:, 1:].flatten().bool()
        hidden_ND = hidden(batch)[:, :-1].flatten(0, 1)[keep_N]
        rows.append(in_chunks(top, hidden_ND, vocab_size=vocab_size).cpu())
        labels.append(batch["input_ids"][:, 1:].flatten()[keep_N].cpu())
    tokens_NK, log_p_NK, log_rest_N1 = torch.cat(rows).split([k, k, 1], -1)
    return Likeliest(tokens_NK.long(), log_p_NK, log_rest_N1[:, 0], torch.cat(labels))


@dataclass(frozen=True)
class Trust:
    """How often a model is right, how sure it is, and how far the two are apart.

    ``score`` is accuracy - ECE: right, and knowing when (FIRST, Shum et al., 2024, arXiv 2408.12168).
    """

    accuracy: float
    confidence: float
    ece: float

    @property
    def score(self) -> float:
        return self.accuracy - self.ece


def trust(confidence_N: Tensor, correct_N: Tensor, *, bins: int = 10) -> Trust:
    """The figures of predictions made with these probabilities, of which these are right: both (N,)."""
    table = Reliability(bins)
    table.add(confidence_N, correct_N)
    return Trust(float(correct_N.double().mean()), float(confidence_N.double().mean()), table.ece)


def candidates(rescale: Rescale) -> list[float]:
    """Values of c that are tried, the nearest to 1 first; none for forms that have no c."""
    if rescale.form == "power":
        found = np.geomspace(0.1, 10, 81)
    elif rescale.form == "probabilities":
        found = np.geomspace(0.02, 2, 81)
    else:
        return []
    return sorted(found.round(6).tolist(), key=lambda c: abs(math.log(c)))


def fit_c(
    log_p_NM: Tensor, correct_N: Tensor, *, rescale: Rescale, bins: int = 10
) -> tuple[Rescale, list[tuple[float, float]]]:
    """``rescale`` with the c whose confidences err least, and the curve (c, ECE).

    ``log_p_NM``: log-probabilities of the outcomes, the likeliest token first; ``correct_N``: whether that is right. Of
    equally good values the nearest to 1 is taken. Forms without a c come back as they are, with an empty curve.
    """

    def error(c: float) -> float:
        return trust(replace(rescale, c=c)(log_p_NM)[:, 0].exp(), correct_N, bins=bins).ece

    curve = [(c, error(c)) for c in candidates(rescale)]
    if not curve:
        return rescale, []
    best, _ = min(curve, key=lambda point: point[1])
    return replace(rescale, c=best), sorted(curve)
