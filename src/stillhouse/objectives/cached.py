"""Terms on a teacher whose outputs were kept: see `stillhouse.teachers.cache`.

Shapes: B sequences, T tokens, D hidden width, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.losses.divergences import RowDivergence
from stillhouse.losses.sparse_divergence import Rest, linear_topk_divergence
from stillhouse.objectives.language import LanguageHead, fused_values, predicted
from stillhouse.objectives.scheduled import ScheduledDivergence


class CachedTokenMatch(Term):
    """`TokenMatch` against a cached teacher: a divergence of next-token distributions, with an optional label loss.

    Args:
        student: output head (`head_of`).
        teacher: `cached_teacher` of a top-k column, position t after token t; or of whole logits.
        rest: what becomes of the tokens not kept: one "bucket", or their mass spread "even"; see
            `linear_topk_divergence`.
        divergence, divergence_weight, cross_entropy, vocab_size, chunk_tokens, rows, scheduled: as in `TokenMatch`.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: Observed,
        divergence: RowDivergence,
        *,
        whole: bool = False,
        rest: Rest = "bucket",
        divergence_weight: Scheduled = 1.0,
        cross_entropy: Scheduled = 0.0,
        vocab_size: int | None = None,
        chunk_tokens: int | None = None,
        rows: str | None = None,
        name: str | None = None,
        **scheduled: Scheduled,
    ) -> None:
        parts = ("logits",) if whole else ("tokens", "log_p", "log_rest")
        kept = {part: teacher.output(part).detach() for part in parts}
        super().__init__(name=name or type(divergence).__name__, **student.signals("student"), **kept)
        self.head = student
        self.rest: Rest = rest
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
        batch: Batch,
        progress: Progress,
        student_bias: Tensor | None = None,
        logits: Tensor | None = None,
        tokens: Tensor | None = None,
        log_p: Tensor | None = None,
        log_rest: Tensor | None = None,
    ) -> list[TermValue]:
        labels_BT, weight_BT = predicted(batch, rows=self.rows)
        if logits is not None:
            log_p = logits.log_softmax(-1)
            tokens = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
            log_rest = torch.full(logits.shape[:-1], -torch.inf, device=logits.device)
        assert tokens is not None and log_p is not None and log_rest is not None
        divergence_weight = self.at(self.divergence_weight, progress)
        label_weight = self.at(self.cross_entropy, progress)
        result = linear_topk_divergence(
            student_hidden[:, :-1],
            student_weight,
            tokens,
            log_p,
            log_rest,
            divergence=self.divergence.now(self, progress),
            rest=self.rest,
            student_bias_V=student_bias,
            student_logit_scale=self.head.scale,
            student_softcap=self.head.softcap,
            labels_N=None if self.cross_entropy == 0 else labels_BT,
            divergence_weight=divergence_weight,
            cross_entropy_weight=label_weight,
            weight_N=weight_BT,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
        )
        self.divergence.record(result.divergence, progress)
        return fused_values(self.name, result, divergence_weight, label_weight)
