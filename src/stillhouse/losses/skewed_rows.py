"""Skewed KLs whose skew differs from row to row, straight from hidden states, and the skew that a gap asks for.

Shapes: N tokens (any leading shape, e.g. BT), R responses, C tokens of one chunk, D student width, E teacher width, V
vocabulary. q is the student, p the teacher, both softened by a temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from stillhouse.losses.divergences import common_vocabulary, log_softmax
from stillhouse.losses.linear_divergence import OutputLayer, RowTerm, linear_loss, row_weights
from stillhouse.losses.token_logprobs import Head

Direction = Literal["skew-forward", "skew-reverse"]


def skew_for_gap(gap_R: Tensor, anchor: float, *, skew: float = 0.1, least: float = 0.01) -> Tensor:
    """The skew with which every response weighs alike: (1 - alpha) gap = (1 - skew) anchor, in [least, skew]: (R).

    To first order log p / (alpha p + (1 - alpha) q) is (1 - alpha)(p - q) (Ko et al., 2025, arXiv 2503.07067, eq. 7,
    alg. 1). A response as hard as the ``anchor`` or harder gets the whole ``skew``, an easier one less; one with no
    gap, or with one the other way, the ``least``.
    """
    wanted_R = 1 - (1 - skew) * anchor / gap_R.clamp(min=torch.finfo(gap_R.dtype).tiny)
    return wanted_R.masked_fill(gap_R <= 0, least).clamp(least, skew)


@dataclass(frozen=True, kw_only=True, eq=False)
class SkewedByRow:
    """``skew-forward``: KL(p || alpha p + (1 - alpha) q); ``skew-reverse``: KL(q || alpha q + (1 - alpha) p).

    `SkewedForwardKL` and `SkewedReverseKL` of `stillhouse.losses.divergences` with an alpha for every row.

    Args:
        skew: alpha (...), of the rows' leading shape, above 0 and below 1.
    """

    skew: Tensor
    direction: Direction
    temperature: float = 1.0

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        log_q_NV, log_p_NV = self._softened(student_logits_NV, teacher_logits_NV)
        own_NV, log_m_NV = self._mixed(log_q_NV, log_p_NV)
        return (own_NV.exp() * (own_NV - log_m_NV)).sum(-1) * self.temperature**2

    @torch.no_grad()
    def value_and_grad(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every row and its gradient in the student logits: (..., V), (..., V) -> (...), (..., V)."""
        log_q_NV, log_p_NV = self._softened(student_logits_NV, teacher_logits_NV)
        own_NV, log_m_NV = self._mixed(log_q_NV, log_p_NV)
        log_ratio_NV = own_NV - log_m_NV
        loss_N = (own_NV.exp() * log_ratio_NV).sum(-1)
        q_NV, alpha_N1 = log_q_NV.exp(), self._alpha(log_q_NV)
        if self.direction == "skew-forward":
            slope_NV = (alpha_N1 - 1) * log_ratio_NV.exp()  # d loss / d q
        else:
            slope_NV = log_ratio_NV - alpha_N1 * log_ratio_NV.exp()  # and a constant, which the softmax takes away
        terms_NV = slope_NV.mul_(q_NV)
        grad_NV = terms_NV.addcmul_(q_NV, terms_NV.sum(-1, keepdim=True), value=-1)
        return loss_N * self.temperature**2, grad_NV.mul_(self.temperature)

    def _softened(self, *logits_NV: Tensor) -> list[Tensor]:
        dtype = torch.promote_types(torch.promote_types(logits_NV[0].dtype, logits_NV[1].dtype), torch.float32)
        return [log_softmax(one_NV.to(dtype), temperature=self.temperature) for one_NV in logits_NV]

    def _alpha(self, like_NV: Tensor) -> Tensor:
        return self.skew.to(like_NV.dtype).unsqueeze(-1)

    def _mixed(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the side that is averaged over, and of the mixture."""
        own_NV, other_NV = (log_p_NV, log_q_NV) if self.direction == "skew-forward" else (log_q_NV, log_p_NV)
        alpha_N1 = self._alpha(own_NV)
        return own_NV, torch.logaddexp(own_NV + alpha_N1.log(), other_NV + torch.log1p(-alpha_N1))


@dataclass(frozen=True, kw_only=True)
class _SkewTerm(RowTerm):
    hidden: Tensor
    head: OutputLayer
    divergence: SkewedByRow
    memory: Tensor | None = None

    def keep(self, keep_N: Tensor) -> Self:
        divergence = replace(self.divergence, skew=self.divergence.skew[keep_N])
        return replace(self, row_weight=self.row_weight[keep_N], hidden=self.hidden[keep_N], divergence=divergence)

    def at(self, rows: slice) -> Self:
        return replace(self, divergence=replace(self.divergence, skew=self.divergence.skew[rows]))

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        hidden = self.hidden if autocast is None else self.hidden.to(autocast)
        return replace(self, hidden=hidden, head=self.head.ready(autocast), memory=torch.empty_like(like_CV))

    def target(self, chunk: slice) -> Tensor:
        assert self.memory is not None
        return self.head.logits(self.hidden[chunk], self.memory[: chunk.stop - chunk.start])

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        return self.divergence(z_CV, target_C)

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        return self.divergence.value_and_grad(z_CV, target_C)


def linear_skewed_kl(
    student_hidden_ND: Tensor,
    student: Head,
    teacher_hidden_NE: Tensor,
    teacher: Head,
    *,
    skew_N: Tensor,
    direction: Direction,
    temperature: float = 1.0,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The weighted mean over tokens of `SkewedByRow`, without full logits: a scalar.

    ``skew_N`` is a token's alpha; the other arguments, precision and errors are those of `linear_divergence`.
    """
    size = common_vocabulary(len(student.weight), len(teacher.weight), vocab_size)
    divergence = SkewedByRow(skew=skew_N.detach().flatten(), direction=direction, temperature=temperature)
    term = _SkewTerm(
        row_weight=row_weights("weight_N", weight_N, student_hidden_ND),
        coefficient=1.0,
        hidden=teacher_hidden_NE.detach().flatten(0, -2),
        head=OutputLayer(teacher.weight, teacher.bias, teacher.scale, teacher.softcap, size),
        divergence=divergence,
    )
    layer = OutputLayer(student.weight, student.bias, student.scale, student.softcap, size)
    return linear_loss(student_hidden_ND, layer, [term], None, "mean")[0]
