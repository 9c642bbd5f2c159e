"""Divergences that tell a row's label (the target) from the other outcomes (the non-targets).

Shapes: N rows (tokens or images; any leading shape), V classes or vocabulary entries, 1 an axis of size one.
q = softmax(student logits), p = softmax(teacher logits); q^ and p^ are the same over the non-targets alone, softened by
a temperature: they sum to 1 whatever the target has.

These are row divergences that ask for labels: ``NKD().given(labels_N)(student_logits_NV, teacher_logits_NV)``.
Objectives and fused passes call `given` themselves, with the labels of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from stillhouse.losses.divergences import log_softmax


def only_label(labels_N: Tensor, like_NV: Tensor) -> Tensor:
    """A mask (..., V) that is True at each row's label."""
    mask_NV = torch.zeros_like(like_NV, dtype=torch.bool)
    return mask_NV.scatter_(-1, labels_N.unsqueeze(-1), True)


def nontarget_log_softmax(logits_NV: Tensor, target_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the entries that are not targets; at those -inf, without gradient."""
    return log_softmax(logits_NV.masked_fill(target_NV, -math.inf), temperature=temperature)


def nontarget_cross_entropy(log_q_NV: Tensor, p_NV: Tensor, target_NV: Tensor) -> Tensor:
    """-sum over the non-targets of p^ log q^: (..., V) twice -> (...); p^ must be 0 at the targets."""
    return -(p_NV * log_q_NV.masked_fill(target_NV, 0.0)).sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """A row divergence that asks for the label of every row."""

    labels: Tensor | None = None

    def given(self, labels_N: Tensor) -> Self:
        """The divergence for rows with these labels, (...)."""
        return replace(self, labels=labels_N)

    def _raised(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both logits in at least float32, and the mask of the labels."""
        if self.labels is None:
            raise ValueError(f"{type(self).__name__} needs the rows' labels: call given(labels) first")
        dtype = torch.promote_types(
            torch.promote_types(student_logits_NV.dtype, teacher_logits_NV.dtype), torch.float32
        )
        z_NV, t_NV = student_logits_NV.to(dtype), teacher_logits_NV.to(dtype)
        return z_NV, t_NV, only_label(self.labels, z_NV)


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature}")


@dataclass(frozen=True, kw_only=True, eq=False)
class NKD(Labelled):
    """-p_y log q_y - gamma T^2 sum_{i != y} p^_i log q^_i (Yang et al., ICCV 2023, arXiv 2303.13005, equation 9).

    The label's probabilities are at temperature 1, those of the others at ``temperature`` T; p takes no gradient. Meant
    to be added to the cross-entropy. The value is not 0 but least where q^ = p^ and q_y = 1.

    Raises ``ValueError`` unless ``temperature`` > 0, and when called without labels.
    """

    gamma: float = 1.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        z_NV, t_NV, target_NV = self._raised(student_logits_NV, teacher_logits_NV.detach())
        y_N1 = self.labels.unsqueeze(-1)  # type: ignore[union-attr]
        log_q_y_N = log_softmax(z_NV).gather(-1, y_N1).squeeze(-1)
        p_y_N = log_softmax(t_NV).gather(-1, y_N1).squeeze(-1).exp()
        log_qh_NV = nontarget_log_softmax(z_NV, target_NV, temperature=self.temperature)
        ph_NV = nontarget_log_softmax(t_NV, target_NV, temperature=self.temperature).exp()
        others_N = nontarget_cross_entropy(log_qh_NV, ph_NV, target_NV)
        return -p_y_N * log_q_y_N + self.gamma * self.temperature**2 * others_N

    @torch.no_grad()
    def value_and_grad(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss of every row and its gradient in the student logits: p_y (q - e_y), and gamma T (q^ - p^) elsewhere."""
        z_NV, t_NV, target_NV = self._raised(student_logits_NV, teacher_logits_NV)
        y_N1 = self.labels.unsqueeze(-1)  # type: ignore[union-attr]
        log_qh_NV = nontarget_log_softmax(z_NV, target_NV, temperature=self.temperature)
        ph_NV = nontarget_log_softmax(t_NV, target_NV, temperature=self.temperature).exp_()
        log_q_NV = log_softmax(z_NV, overwrite=overwrite)
        p_y_N1 = log_softmax(t_NV, overwrite=overwrite).gather(-1, y_N1).exp_()
        target_N = -(p_y_N1 * log_q_NV.gather(-1, y_N1)).squeeze(-1)
        loss_N = target_N + self.gamma * self.temperature**2 * nontarget_cross_entropy(log_qh_NV, ph_NV, target_NV)
        grad_NV = log_q_NV.exp_().mul_(p_y_N1).scatter_add_(-1, y_N1, -p_y_N1)
        return loss_N, grad_NV.add_(log_qh_NV.exp_().sub_(ph_NV), alpha=self.gamma * self.temperature)


@dataclass(frozen=True, kw_only=True, eq=False)
class DKD(Labelled):
    """T^2 (alpha KL(b_p || b_q) + beta KL(p^ || q^)), decoupled KD (Zhao et al., CVPR 2022, arXiv 2203.08679).

    b is the pair (label, all others together); everything is softened by ``temperature`` T. With ``alpha`` = 1 and
    ``beta`` = 1 - p_y the sum would be the forward KL.

    Raises ``ValueError`` unless ``temperature`` > 0, and when called without labels.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        z_NV, t_NV, target_NV = self._raised(student_logits_NV, teacher_logits_NV)
        pair_q_N2, pair_p_N2 = (self._pair(logits_NV, target_NV) for logits_NV in (z_NV, t_NV))
        target_N = (pair_p_N2.exp() * (pair_p_N2 - pair_q_N2)).sum(-1)
        log_qh_NV, log_ph_NV = (
            nontarget_log_softmax(logits_NV, target_NV, temperature=self.temperature).masked_fill(target_NV, 0.0)
            for logits_NV in (z_NV, t_NV)
        )
        others_N = (log_ph_NV.exp() * (log_ph_NV - log_qh_NV)).sum(-1)
        return self.temperature**2 * (self.alpha * target_N + self.beta * others_N)

    def _pair(self, logits_NV: Tensor, target_NV: Tensor) -> Tensor:
        """Log-probabilities of the label and of the rest: (..., 2)."""
        log_NV = log_softmax(logits_NV, temperature=self.temperature)
        label_N1 = log_NV.gather(-1, self.labels.unsqueeze(-1))  # type: ignore[union-attr]
        rest_N1 = log_NV.masked_fill(target_NV, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([label_N1, rest_N1], -1)
