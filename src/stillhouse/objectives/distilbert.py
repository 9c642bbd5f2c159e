"""DistilBERT's loss: soft targets on masked tokens, the tokens themselves, and the direction of hidden states.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.objective import Objective, Term
from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.data.masking import IGNORED
from stillhouse.models.efficient_attention import last_layer
from stillhouse.objectives.logits import CrossEntropy, KLDivergence


class HiddenCosine(Term):
    """Mean over tokens, padding left out, of 1 - cos(student, teacher), both (B, T, D)."""

    def __init__(self, student: Signal, teacher: Signal, *, name: str | None = None) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())

    def compute(self, *, student: Tensor, teacher: Tensor, batch: Batch, **_: Any) -> Tensor:
        apart_BT = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
        mask = batch.get("attention_mask")
        if mask is None:
            return apart_BT.mean()
        apart_BT = apart_BT[:, : mask.shape[1]]  # some attentions pad further
        return (apart_BT * mask).sum() / mask.sum()


def triple_loss(
    student: Observed, teacher: Observed, *, soft: float, masked: float, cosine: float, temperature: float
) -> Objective:
    """soft * T^2 KL(teacher_T || student_T) on masked tokens + masked * cross-entropy + cosine * (1 - cos).

    Sanh et al. (2019, arXiv 1910.01108); the weights 5, 2, 1 and T = 2 are those of their released training recipe.
    The batch brings ``labels`` with `IGNORED` where nothing was masked.
    """
    divergence = KLDivergence(
        student.output("logits"),
        teacher.output("logits"),
        temperature=temperature,
        weight=_predicted,
        name="SoftTargets",
    )
    hidden = HiddenCosine(student.tap(last_layer(student.module)), teacher.tap(last_layer(teacher.module)))
    labels = CrossEntropy(student.output("logits"), name="MaskedTokens")
    return soft * divergence + masked * labels + cosine * hidden


def _predicted(batch: Batch) -> Tensor:
    return batch["labels"] != IGNORED
