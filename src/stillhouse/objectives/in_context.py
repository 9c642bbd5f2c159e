"""Objectives of what stands in for a context: a frozen model reads it, and shall say what it says with the context."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.core.objective import Objective, Sum
from stillhouse.core.observed import Observed
from stillhouse.losses.divergences import ForwardKL
from stillhouse.models.demonstration_distiller import readers_of
from stillhouse.objectives.logits import CrossEntropy, LogitMatch


def readers(lm: Any) -> tuple[Observed, Observed]:
    """One model twice, none of its weights trained: as it reads demonstrations, without gradient, and as it reads
    vectors, with a gradient to these."""
    lm.requires_grad_(False)
    demonstrations, vectors = readers_of(lm)
    return (
        Observed(demonstrations, frozen=True, name="with demonstrations"),
        Observed(vectors, mode="eval", name="with vectors"),
    )


def as_with_demonstrations(
    distiller: Observed, lm: Any, *, labels: float, kl: float, temperature: float = 1.0
) -> Objective:
    """``labels`` cross-entropy of the answer + ``kl`` KL(with the demonstrations || with the distiller's vectors).

    The KL is the mean over all tokens of question and answer (``attention_mask``), the cross-entropy over
    ``targets`` (B, T - 1). With an encoder and a decoder both are over what the decoder writes (``answer_mask``,
    ``targets`` (B, Y)). A weight of 0 leaves its term out.
    """
    teacher, reader = readers(lm)
    logits = reader.view("vectors", feed={"vectors": distiller.output()}).output()
    terms: list[Objective] = []
    writes = lm.config.is_encoder_decoder
    if labels:
        terms.append(labels * CrossEntropy(logits if writes else logits.map(_but_last), target="targets"))
    if kl:
        divergence = ForwardKL(temperature=temperature)
        weight = "answer_mask" if writes else "attention_mask"
        terms.append(kl * LogitMatch(logits, teacher.output(), divergence, weight=weight, name="KL"))
    return Sum(terms) if len(terms) > 1 else terms[0]


def _but_last(logits_BTV: Tensor) -> Tensor:
    return logits_BTV[:, :-1]
