"""A skewed KL that is skewed less where a response is easy.

Shapes: B rows, T tokens, D and E hidden widths, N tokens of the rows that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch
from stillhouse.core.schedule import Progress
from stillhouse.losses.preference import sums_by_row
from stillhouse.losses.skewed_rows import Direction, linear_skewed_kl, skew_for_gap
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.objectives.language import LanguageHead, predicted
from stillhouse.objectives.responses import opened


class CurriculumSkew(Term):
    """A skewed KL whose skew follows each response's difficulty (DistiLLM-2, Ko et al., 2025, arXiv 2503.07067, 3.3).

    A response's gap is p - q on the teacher's text and q - p on the student's, where p and q are the geometric means of
    the probabilities that teacher and student give its tokens. Until ``until`` the skew is fixed and the mean gap is
    measured; from then on it is what `skew_for_gap` says, response by response. The mean gap is a buffer.

    Args:
        student, teacher: output heads; the teacher's must know every token, so that a cached top-k will not do.
        own: whether it is the student's text.
        rows: entry of the batch that weighs its rows (B).
        until: share of the run (the paper: its first epoch).
        skew, least: the fixed skew, and the least of an easy response.
    """

    measured: Tensor

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        direction: Direction,
        *,
        own: bool,
        rows: str,
        until: float = 1 / 3,
        skew: float = 0.1,
        least: float = 0.01,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        name: str | None = None,
    ) -> None:
        signals = {**student.signals("student"), **teacher.signals("teacher", detach=True)}
        super().__init__(name=name or direction, **signals)
        self.heads = (student, teacher)
        self.direction: Direction = direction
        self.own = own
        self.rows = rows
        self.until = until
        self.skew = skew
        self.least = least
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.register_buffer("measured", torch.zeros(2, dtype=torch.float64))  # sum of the gaps, their number

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> Tensor:
        labels_BT, weight_BT = predicted(batch, rows=self.rows)
        student_BTD, student = opened(self.heads[0], "student", tensors)
        teacher_BTE, teacher = opened(self.heads[1], "teacher", tensors)
        skew_B = torch.full((len(labels_BT),), self.skew, device=labels_BT.device)
        read_B = (weight_BT != 0).any(1)
        with torch.no_grad():
            gap_B = self._gaps(student_BTD, student, teacher_BTE, teacher, labels_BT, weight_BT != 0)
            if progress.fraction < self.until:
                self._measure(gap_B[read_B])
            elif self.measured[1] > 0:
                anchor = float(self.measured[0] / self.measured[1])
                skew_B = skew_for_gap(gap_B, anchor, skew=self.skew, least=self.least)
        if read_B.any():
            self.log("gap", gap_B[read_B].mean())
            self.log("skew", skew_B[read_B].mean())
        return linear_skewed_kl(
            student_BTD,
            student,
            teacher_BTE,
            teacher,
            skew_N=skew_B[:, None].expand(labels_BT.shape),
            direction=self.direction,
            temperature=self.temperature,
            weight_N=weight_BT,
            vocab_size=self.vocab_size,
        )

    def _gaps(
        self,
        student_BTD: Tensor,
        student: Head,
        teacher_BTE: Tensor,
        teacher: Head,
        labels_BT: Tensor,
        at_BT: Tensor,
    ) -> Tensor:
        """How much likelier a token of each row is to the side that wrote it: (B), 0 where a row does not count."""
        rows, row_N = len(labels_BT), at_BT.nonzero()[:, 0]
        count_B = torch.bincount(row_N, minlength=rows).clamp(min=1)

        def mean(hidden_BTD: Tensor, head: Head) -> Tensor:
            logp_N = token_logprobs(hidden_BTD[at_BT], head, labels_BT[at_BT], temperature=self.temperature)
            return (sums_by_row(logp_N, row_N, rows) / count_B).exp()

        q_B, p_B = mean(student_BTD, student), mean(teacher_BTE, teacher)
        return q_B - p_B if self.own else p_B - q_B

    def _measure(self, gap_R: Tensor) -> None:
        if not self.training:
            return
        found = torch.stack([gap_R.double().sum(), gap_R.new_tensor(len(gap_R), dtype=torch.float64)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)  # all processes take turns together, and need one anchor
        self.measured += found.to(self.measured)
