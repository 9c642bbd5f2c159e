"""Terms for language models, straight from hidden states: full logits are never held.

Shapes: B sequences, T tokens, D and E hidden widths, V vocabulary. Position t predicts token t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed, Signal, View
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.losses.divergences import LabelledDivergence, RowDivergence
from stillhouse.losses.linear_divergence import LinearDivergence, linear_cross_entropy, linear_divergence
from stillhouse.models.causal_lm import output_head
from stillhouse.objectives.scheduled import ScheduledDivergence


@dataclass(frozen=True)
class LanguageHead:
    """A language model's output layer, opened: the hidden states it reads and the matrix it multiplies them with."""

    hidden: Signal
    weight: Signal
    bias: Signal | None = None
    softcap: float | None = None
    scale: float = 1.0

    def signals(self, prefix: str, *, detach: bool = False) -> dict[str, Signal]:
        """The signals by name, for a term's constructor."""
        found = {"hidden": self.hidden, "weight": self.weight, **({"bias": self.bias} if self.bias else {})}
        return {f"{prefix}_{key}": signal.detach() if detach else signal for key, signal in found.items()}


def head_of(model: Observed | View) -> LanguageHead:
    """The output head of an observed ``transformers`` language model, or of one view of it.

    The model's forward then ends before the head.
    """
    module: Any = model.observed.module if isinstance(model, View) else model.module
    head = output_head(module)
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    bias = f"{head.path}.bias"
    return LanguageHead(
        hidden=model.tap(head.path, of="input"),
        weight=model.parameter(f"{head.path}.weight"),
        bias=model.parameter(bias) if bias in names else None,
        softcap=head.softcap,
        scale=head.logit_scale,
    )


def predicted(batch: Batch, *, rows: str | None = None) -> tuple[Tensor, Tensor]:
    """What position t has to predict: labels (B, T - 1), and the weight of each prediction (B, T - 1).

    Weights are the batch's ``loss_mask`` if it has one (1 on response tokens), else its ``attention_mask``, else 1;
    times those of its rows, the batch's entry ``rows``.
    """
    labels_BT = batch["input_ids"][:, 1:]
    mask = batch.get("loss_mask", batch.get("attention_mask"))
    weight_BT = torch.ones_like(labels_BT) if mask is None else mask[:, 1:]
    return labels_BT, weight_BT if rows is None else weight_BT * batch[rows][:, None]


def fused_values(name: str, result: LinearDivergence, divergence_weight: float, label_weight: float) -> list[TermValue]:
    """The terms of a pass that computed a divergence and perhaps a cross-entropy; the first carries the sum."""
    values = [TermValue(name, result.divergence, divergence_weight, carrier=result.loss)]
    if result.cross_entropy is not None:
        nothing = torch.zeros_like(result.cross_entropy)
        values.append(TermValue("CrossEntropy", result.cross_entropy, label_weight, carrier=nothing))
    return values


class TokenMatch(Term):
    """A divergence between two language models' next-token distributions, with an optional label loss in one pass.

    Args:
        student, teacher: output heads (`head_of`).
        divergence: one of `stillhouse.losses.divergences`, or a callable that gives a loss per row of logits. One that
            asks for labels (`stillhouse.losses.target_split`) gets the next token.
        divergence_weight, cross_entropy: weights of the two terms; numbers or schedules.
        vocab_size: the real vocabulary, where models pad theirs differently.
        chunk_tokens: tokens whose logits exist at one time; chosen from the vocabulary by default.
        rows: entry of the batch that weighs its rows (B); those of weight 0 cost nothing.
        scheduled: fields of ``divergence`` that follow a schedule.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        divergence: RowDivergence,
        *,
        divergence_weight: Scheduled = 1.0,
        cross_entropy: Scheduled = 0.0,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
        rows: str | None = None,
        name: str | None = None,
        **scheduled: Scheduled,
    ) -> None:
        signals = {**student.signals("student"), **teacher.signals("teacher", detach=True)}
        super().__init__(name=name or type(divergence).__name__, **signals)
        self.heads = (student, teacher)
        self.divergence = ScheduledDivergence(divergence, **scheduled)
        self.divergence_weight = divergence_weight
        self.cross_entropy = cross_entropy
        self.vocab_size = vocab_size
        self.chunk_tokens = chunk_tokens
        self.rows = rows

    def compute(
        self,
        *,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        batch: Batch,
        progress: Progress,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> list[TermValue]:
        labels_BT, weight_BT = predicted(batch, rows=self.rows)
        student, teacher = self.heads
        divergence_weight = self.at(self.divergence_weight, progress)
        label_weight = self.at(self.cross_entropy, progress)
        divergence = self.divergence.now(self, progress)
        with_labels = self.cross_entropy != 0 or isinstance(divergence, LabelledDivergence)
        result = linear_divergence(
            student_hidden[:, :-1],
            student_weight,
            teacher_hidden[:, :-1],
            teacher_weight,
            divergence=divergence,
            student_bias_V=student_bias,
            teacher_bias_V=teacher_bias,
            student_logit_scale=student.scale,
            teacher_logit_scale=teacher.scale,
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            labels_N=labels_BT if with_labels else None,
            divergence_weight=divergence_weight,
            cross_entropy_weight=label_weight,
            weight_N=weight_BT,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
        )
        self.divergence.record(result.divergence, progress)
        return fused_values(self.name, result, divergence_weight, label_weight)


class TokenCrossEntropy(Term):
    """Next-token cross-entropy of a language model against its batch.

    ``entry``: the part of the batch that the head's view reads, where that is not the batch itself.
    """

    def __init__(
        self,
        student: LanguageHead,
        *,
        vocab_size: int | None = None,
        entry: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name or "CrossEntropy", **student.signals("student"))
        self.head = student
        self.vocab_size = vocab_size
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
        labels_BT, weight_BT = predicted(batch if self.entry is None else batch[self.entry])
        return linear_cross_entropy(
            student_hidden[:, :-1],
            student_weight,
            labels_BT,
            bias_V=student_bias,
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
            weight_N=weight_BT,
            vocab_size=self.vocab_size,
        )
