"""Divergences to a teacher's few likeliest tokens, whose probabilities are first re-scaled to be trusted (FIRST).

Shapes: N tokens (any leading shape), K kept tokens, M outcomes that are compared: K, or K + 1 with all other tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["power", "probabilities", "smoothing", "none"]
Side = Literal["kept", "bucket", "whole"]


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """What becomes of a teacher's probabilities P before a student sees them (Shum et al., 2024, arXiv 2408.12168).

    - ``form="power"``: P^(1/c) / sum P^(1/c), a temperature c on logits. c = 1 changes nothing, c -> 0 leaves the
      likeliest outcome, c -> infinity none before another.
    - ``form="probabilities"``: softmax(P / c), a temperature on probabilities, as released. The inputs differ by 1 at
      most, so that c must be well below 1.
    - ``form="smoothing"``: ``delta`` of the likeliest outcome is shared evenly among the others.
    - ``form="none"``: P / sum P.

    Raises ``ValueError`` unless ``c`` > 0 and 0 <= ``delta`` < 1.
    """

    form: Form = "power"
    c: float = 1.0
    delta: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and self.c > 0):
            raise ValueError(f"c must be a positive number, got {self.c}")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must be a share from 0 to below 1, got {self.delta}")

    def __call__(self, log_p_NM: Tensor) -> Tensor:
        """Log-probabilities in, log-probabilities that sum to 1 out: (..., M) -> (..., M)."""
        match self.form:
            case "power":
                return (log_p_NM / self.c).log_softmax(-1)
            case "probabilities":
                return (log_p_NM.exp() / self.c).log_softmax(-1)
            case "smoothing":
                return self._smoothed(log_p_NM.log_softmax(-1).exp()).log()
            case "none":
                return log_p_NM.log_softmax(-1)

    def _smoothed(self, p_NM: Tensor) -> Tensor:
        if p_NM.shape[-1] == 1:
            return p_NM
        best_N1 = p_NM.argmax(-1, keepdim=True)
        taken_N1 = p_NM.gather(-1, best_N1).clamp(max=self.delta)  # no more than there is
        share_N1 = taken_N1 / (p_NM.shape[-1] - 1)
        return (p_NM + share_N1).scatter_add(-1, best_N1, -taken_N1 - share_N1).clamp(min=0)


def compared(log_p_NK: Tensor, log_rest_N: Tensor, *, side: Side) -> Tensor:
    """The outcomes a teacher and a student are compared on: the kept tokens, with ``side="bucket"`` the rest last."""
    return torch.cat([log_p_NK, log_rest_N.unsqueeze(-1)], -1) if side == "bucket" else log_p_NK


@dataclass(frozen=True, kw_only=True)
class ConcentratedKL:
    """sum over the kept tokens of P~ (log P~ - log q~), P~ the re-scaled teacher.

    Called, as `linear_topk_divergence` does, with log-probabilities of ``kept`` tokens and, last, of all others
    together, (..., K + 1); where the kept are the vocabulary there are no others, (..., K).

    - ``side="kept"``: q~ sums to 1 over the kept tokens, as published. What the student gives to others costs nothing.
    - ``side="bucket"``: the others are one more outcome on both sides.
    - ``side="whole"``: q~ is the student's probability among all tokens: a cross-entropy to the kept ones.

    ``student_c`` puts the student through the softmax of probabilities too, q~ = softmax(q / student_c).

    Raises ``ValueError`` on a ``student_c`` with ``side="whole"``: a softmax of probabilities sums to 1 over these.
    """

    kept: int
    rescale: Rescale = Rescale()
    side: Side = "kept"
    student_c: float | None = None

    def __post_init__(self) -> None:
        if self.student_c is not None and self.side == "whole":
            raise ValueError("student_c does not go with side='whole', where the kept tokens need not sum to 1")
        if self.student_c is not None and not self.student_c > 0:
            raise ValueError(f"student_c must be a positive number, got {self.student_c}")

    def _cut(self, log_NL: Tensor) -> Tensor:
        return log_NL if self.side == "bucket" else log_NL[..., : self.kept]

    def student(self, log_q_NL: Tensor) -> Tensor:
        """log q~: (..., K + 1) -> (..., M)."""
        log_q_NL = log_q_NL.log_softmax(-1)  # they sum to 1 already; so no constant added to a row matters
        if self.student_c is not None:
            return (self._cut(log_q_NL).exp() / self.student_c).log_softmax(-1)
        return self._cut(log_q_NL).log_softmax(-1) if self.side == "kept" else self._cut(log_q_NL)

    def __call__(self, log_q_NL: Tensor, log_p_NL: Tensor) -> Tensor:
        """Loss of every row: (..., K + 1) twice -> (...)."""
        log_p_NM, log_q_NM = self.rescale(self._cut(log_p_NL)), self.student(log_q_NL)
        p_NM = log_p_NM.exp()
        return (p_NM * (log_p_NM - log_q_NM).masked_fill(p_NM == 0, 0.0)).sum(-1)
