"""Terms for models that read one text and write another, encoder-decoder or decoder alone.

Shapes: B sequences, T target positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.core.objective import Objective, Term
from stillhouse.core.observed import Batch, Observed
from stillhouse.losses.linear_divergence import linear_cross_entropy
from stillhouse.objectives.language import LanguageHead, head_of


class SequenceCrossEntropy(Term):
    """Mean cross-entropy per target token of a model that is fed ``batch[entry]``; 0 where a batch has no target.

    ``batch[entry]["labels"]`` (B, T) says what each position of the output has to be; -100 is left out. Logits are
    never held in full.

    Args:
        student: the output head of the view that reads ``batch[entry]``.
    """

    def __init__(self, student: LanguageHead, entry: str, *, name: str | None = None) -> None:
        super().__init__(name=name or entry, **student.signals("student"))
        self.head = student
        self.entry = entry

    def compute(
        self,
        *,
        student_hidden: Tensor,
        student_weight: Tensor,
        batch: Batch,
        student_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        labels_BT = batch[self.entry]["labels"]
        return linear_cross_entropy(
            student_hidden,
            student_weight,
            labels_BT.clamp(min=0),
            bias_V=student_bias,
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
            weight_N=labels_BT != -100,
        )


def sequence_cross_entropy(student: Observed, entry: str) -> SequenceCrossEntropy:
    """The term for one task: the student is fed ``batch[entry]``, under a view of that name."""
    return SequenceCrossEntropy(head_of(student.view(entry)), entry)


def rationale_multitask(student: Observed, *, rationale_weight: float | None = 1.0, alpha: float = 0.5) -> Objective:
    """L_label + lambda L_rationale (Hsieh et al., 2023, arXiv 2305.02301, equation 3), lambda = ``rationale_weight``.

    With ``rationale_weight`` None, the form of the authors' code: alpha L_label + (1 - alpha) L_rationale. The tasks
    are the batch's entries ``predict`` and ``explain``; one with weight 0 is not run at all.
    """
    label, rationale = (1.0, rationale_weight) if rationale_weight is not None else (alpha, 1 - alpha)
    weights = {"predict": label, "explain": rationale}
    first, *rest = [weight * sequence_cross_entropy(student, entry) for entry, weight in weights.items() if weight]
    objective: Objective = first
    for term in rest:
        objective = objective + term
    return objective
