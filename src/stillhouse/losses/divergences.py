"""Row divergences between a student q and a teacher p, computed from their logits.

Shapes: N rows (tokens; any leading shape, e.g. BT), V vocabulary entries or classes.
q = softmax(student logits / temperature), p = softmax(teacher logits / temperature).

Every divergence is a small frozen dataclass, called as ``divergence(student_logits_NV, teacher_logits_NV)``
and returning one number per row, ``loss_N``. It is differentiable in both arguments; detach the teacher
where no gradient should reach it. Half-precision logits are raised to float32, float64 stays float64.
``value_and_grad`` returns the loss together with its closed-form gradient in the student logits.

A hyper-parameter that follows a schedule is set with ``dataclasses.replace(divergence, temperature=2.0)``.
Combinations need no class: any callable of two logits tensors that keeps rows apart is a divergence, such as
``lambda s, t: 0.5 * ForwardKL()(s, t) + 0.5 * ReverseKL()(s, t)``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


class RowDivergence(Protocol):
    """Any function of student and teacher logits that returns one loss per row and keeps rows apart."""

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, /) -> Tensor: ...


@runtime_checkable
class LabelledDivergence(Protocol):
    """A row divergence that asks for the label of every row; see `stillhouse.losses.target_split`."""

    def given(self, labels_N: Tensor, /) -> RowDivergence: ...


@runtime_checkable
class ClosedFormGradient(Protocol):
    """A row divergence that knows its own gradient in the student logits; see ``value_and_grad``."""

    def value_and_grad(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, /, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]: ...


def value_and_grad(
    divergence: RowDivergence,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of every row and its gradient in the student logits, both detached: (..., V) -> (...), (..., V).

    Takes the closed form where the divergence has one and asks autograd otherwise, so that a divergence
    written as a plain function works everywhere. The gradient is at least float32. ``overwrite`` allows the
    memory of both logits to be used up on the way; it changes no result.
    """
    if isinstance(divergence, ClosedFormGradient):
        return divergence.value_and_grad(student_logits_NV, teacher_logits_NV, overwrite=overwrite)
    with torch.enable_grad():
        dtype = _working_dtype(student_logits_NV, teacher_logits_NV)
        student_logits_NV = student_logits_NV.detach().to(dtype).requires_grad_()
        loss_N = divergence(student_logits_NV, teacher_logits_NV.detach().to(dtype))
        (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_logits_NV)
    return loss_N.detach(), grad_NV


@dataclass(frozen=True, kw_only=True)
class _Softened:
    """What the members share: both sides are softened by ``temperature`` T before they are compared.

    With ``scale_by_t2`` the result is multiplied by T^2, which keeps gradients of the same size when T
    changes (Hinton et al., 2015, arXiv 1503.02531, section 2).
    """

    temperature: float = 1.0
    scale_by_t2: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        dtype = _working_dtype(student_logits_NV, teacher_logits_NV)
        log_q_NV, log_p_NV = (
            log_softmax(logits_NV.to(dtype), temperature=self.temperature)
            for logits_NV in (student_logits_NV, teacher_logits_NV)
        )
        return self._value(log_q_NV, log_p_NV) * self._value_scale

    @torch.no_grad()
    def value_and_grad(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss of every row and its gradient in the student logits: (..., V), (..., V) -> (...), (..., V)."""
        dtype = _working_dtype(student_logits_NV, teacher_logits_NV)
        log_q_NV, log_p_NV = (
            log_softmax(logits_NV.to(dtype), temperature=self.temperature, overwrite=overwrite)
            for logits_NV in (student_logits_NV, teacher_logits_NV)
        )
        loss_N, grad_NV = self._value_and_grad(log_q_NV, log_p_NV)
        if self.temperature != 1.0:
            grad_NV.mul_(self._value_scale / self.temperature)
        return loss_N * self._value_scale, grad_NV

    @property
    def _value_scale(self) -> float:
        return self.temperature**2 if self.scale_by_t2 else 1.0

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        raise NotImplementedError

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient in the softened student logits; may overwrite its arguments."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ForwardKL(_Softened):
    """KL(p || q): covers every mode of the teacher (Hinton et al., 2015, arXiv 1503.02531).

    Raises ``ValueError`` unless ``temperature`` > 0.
    """

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        p_NV = log_p_NV.exp()
        loss_N = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(-1)
        return loss_N, log_q_NV.exp_().sub_(p_NV)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(_Softened):
    """KL(q || p): settles on modes of the teacher (MiniLLM, Gu et al., 2024, arXiv 2306.08543, eq. 1).

    Raises ``ValueError`` unless ``temperature`` > 0.
    """

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        q_NV = log_q_NV.exp()
        terms_NV = log_q_NV.sub_(log_p_NV).mul_(q_NV)
        loss_N = terms_NV.sum(-1)
        return loss_N, _minus_expectation_(terms_NV, q_NV, loss_N)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(_Softened):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al., 2024, eq. 1).

    ``beta`` = 0.5 is the symmetric Jensen-Shannon divergence. The value vanishes at both ends: divided by
    beta it tends to KL(p || q) as beta -> 0, divided by 1 - beta it tends to KL(q || p) as beta -> 1.

    Raises ``ValueError`` unless 0 < ``beta`` < 1 (the ends are ``ForwardKL`` and ``ReverseKL``) and
    ``temperature`` > 0.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}; "
                "at the ends use ForwardKL (beta -> 0) or ReverseKL (beta -> 1)"
            )

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
        log_m_NV = _log(self.beta * p_NV + (1 - self.beta) * q_NV)
        kl_p_N = (p_NV * (log_p_NV - log_m_NV)).sum(-1)
        kl_q_N = (q_NV * (log_q_NV - log_m_NV)).sum(-1)
        return self.beta * kl_p_N + (1 - self.beta) * kl_q_N

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        q_NV, p_NV = log_q_NV.exp(), log_p_NV.exp()
        log_m_NV = _log_(torch.lerp(q_NV, p_NV, self.beta))
        kl_p_N = log_p_NV.sub_(log_m_NV).mul_(p_NV).sum(-1)
        # d loss / d q = (1 - beta) log(q / m)
        terms_NV = log_q_NV.sub_(log_m_NV).mul_(q_NV)
        kl_q_N = terms_NV.sum(-1)
        grad_NV = _minus_expectation_(terms_NV, q_NV, kl_q_N).mul_(1 - self.beta)
        return self.beta * kl_p_N + (1 - self.beta) * kl_q_N, grad_NV


@dataclass(frozen=True, kw_only=True)
class SkewedForwardKL(_Softened):
    """KL(p || m), m = alpha p + (1 - alpha) q (DistiLLM, Ko et al., 2024, arXiv 2402.03898).

    ``alpha`` = 0 is ``ForwardKL``; as alpha -> 1 the value tends to 0. The value is at most -log(alpha).

    Raises ``ValueError`` unless 0 <= ``alpha`` < 1 and ``temperature`` > 0.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_skew(self.alpha)

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        if self.alpha == 0:
            return ForwardKL()._value(log_q_NV, log_p_NV)
        p_NV = log_p_NV.exp()
        log_m_NV = _log(self.alpha * p_NV + (1 - self.alpha) * log_q_NV.exp())
        return (p_NV * (log_p_NV - log_m_NV)).sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return ForwardKL()._value_and_grad(log_q_NV, log_p_NV)
        q_NV, p_NV = log_q_NV.exp_(), log_p_NV.exp()
        log_ratio_NV = log_p_NV.sub_(_log_(torch.lerp(q_NV, p_NV, self.alpha)))
        loss_N = p_NV.mul_(log_ratio_NV).sum(-1)
        # d loss / d q = -(1 - alpha) p / m
        terms_NV = log_ratio_NV.exp_().mul_(q_NV)
        return loss_N, _minus_expectation_(terms_NV, q_NV, terms_NV.sum(-1)).mul_(self.alpha - 1)


@dataclass(frozen=True, kw_only=True)
class SkewedReverseKL(_Softened):
    """KL(q || m), m = alpha q + (1 - alpha) p (DistiLLM, Ko et al., 2024, arXiv 2402.03898).

    ``alpha`` = 0 is ``ReverseKL``; as alpha -> 1 the value tends to 0. The value is at most -log(alpha).

    Raises ``ValueError`` unless 0 <= ``alpha`` < 1 and ``temperature`` > 0.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_skew(self.alpha)

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        if self.alpha == 0:
            return ReverseKL()._value(log_q_NV, log_p_NV)
        q_NV = log_q_NV.exp()
        log_m_NV = _log(self.alpha * q_NV + (1 - self.alpha) * log_p_NV.exp())
        return (q_NV * (log_q_NV - log_m_NV)).sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return ReverseKL()._value_and_grad(log_q_NV, log_p_NV)
        q_NV = log_q_NV.exp()
        log_ratio_NV = log_q_NV.sub_(_log_(torch.lerp(log_p_NV.exp_(), q_NV, self.alpha)))
        loss_N = (q_NV * log_ratio_NV).sum(-1)
        # d loss / d q = log(q / m) + 1 - alpha q / m; the constant vanishes behind the softmax
        slope_NV = log_ratio_NV.sub_(log_ratio_NV.exp(), alpha=self.alpha)
        terms_NV = slope_NV.mul_(q_NV)
        return loss_N, _minus_expectation_(terms_NV, q_NV, terms_NV.sum(-1))


@dataclass(frozen=True, kw_only=True)
class TotalVariation(_Softened):
    """1/2 sum |p - q|, in [0, 1] (f-DISTILL, Wen et al., 2023, arXiv 2307.15190).

    1 - TotalVariation is the acceptance rate of one speculative-decoding step. Where p = q the subgradient
    0 is taken.

    Raises ``ValueError`` unless ``temperature`` > 0.
    """

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        q_NV = log_q_NV.exp_()
        difference_NV = torch.sub(q_NV, log_p_NV.exp_(), out=log_p_NV)
        loss_N = 0.5 * difference_NV.abs().sum(-1)
        terms_NV = difference_NV.sign_().mul_(q_NV)
        return loss_N, _minus_expectation_(terms_NV, q_NV, terms_NV.sum(-1)).mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(_Softened):
    """The alpha-beta divergence of ABKD (Wang et al., 2025, arXiv 2505.04560).

    -1/(alpha beta) sum [ p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta) ],
    continued to alpha = 0, beta = 0 and alpha + beta = 0 by its limits (Cichocki, Cruces and Amari, 2011,
    Entropy 13:134). (1, 0) is ``ForwardKL``, (0, 1) is ``ReverseKL``, (0.5, 0.5) is four times the squared
    Hellinger distance 1 - sum sqrt(p q), (1, 1) is half the squared distance of p and q. Swapping alpha and beta
    swaps p and q. A negative exponent weights what one side thinks impossible and is unbounded there. The
    authors' released code divides its limits by the other exponent once instead of twice: the same at exponent 1.

    Raises ``ValueError`` unless ``alpha`` and ``beta`` are finite and ``temperature`` > 0.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise ValueError(f"alpha and beta must be finite, got alpha={self.alpha}, beta={self.beta}")

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        if alpha == 0 and beta == 0:
            return 0.5 * (log_q_NV - log_p_NV).square().sum(-1)
        total = alpha + beta
        log_ratio_NV = log_q_NV - log_p_NV
        log_mixed_NV = alpha * log_p_NV + beta * log_q_NV
        # (q^total - p^total) / total
        ends_NV = _power_difference(total * log_q_NV, total * log_p_NV, total, log_ratio_NV)
        if abs(alpha) >= abs(beta):
            # (p^alpha q^beta - p^total) / beta
            side_NV = _power_difference(log_mixed_NV, total * log_p_NV, beta, log_ratio_NV)
            return (ends_NV - side_NV).sum(-1) / alpha
        # (q^total - p^alpha q^beta) / alpha
        side_NV = _power_difference(total * log_q_NV, log_mixed_NV, alpha, log_ratio_NV)
        return (side_NV - ends_NV).sum(-1) / beta

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        loss_N = self._value(log_q_NV, log_p_NV)
        # q d loss / d q = (q^total - p^alpha q^beta) / alpha
        terms_NV = _power_difference(
            (self.alpha + self.beta) * log_q_NV,
            self.alpha * log_p_NV + self.beta * log_q_NV,
            self.alpha,
            log_q_NV - log_p_NV,
        )
        return loss_N, _minus_expectation_(terms_NV, log_q_NV.exp_(), terms_NV.sum(-1))


@dataclass(frozen=True, kw_only=True)
class ToDi(_Softened):
    """sum a p log(p/q) + (1 - a) q log(q/p), a = sg(p / (p + q)) for every entry (ToDi, Jung et al., 2025).

    arXiv 2505.16297. The weight a = sigmoid(log p - log q) is taken as constant: where the student says too little
    the term of ``ForwardKL`` draws it up, where it says too much that of ``ReverseKL`` pushes it down. The value is
    KL(p || q) + KL(q || p), as (p^2 - q^2) / (p + q) = p - q, but the gradient is not that of this sum.

    Raises ``ValueError`` unless ``temperature`` > 0.
    """

    def _value(self, log_q_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        log_ratio_NV = log_p_NV - log_q_NV
        a_NV = log_ratio_NV.detach().sigmoid()
        return ((a_NV * log_p_NV.exp() - (1 - a_NV) * log_q_NV.exp()) * log_ratio_NV).sum(-1)

    def _value_and_grad(self, log_q_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio_NV = log_p_NV - log_q_NV
        a_NV = log_ratio_NV.sigmoid()
        up_NV, q_NV = log_p_NV.exp_().mul_(a_NV), log_q_NV.exp_()
        down_NV = a_NV.neg_().add_(1).mul_(q_NV)
        loss_N = torch.sub(up_NV, down_NV).mul_(log_ratio_NV).sum(-1)
        # q d loss / d q = (1 - a) q (1 - log(p/q)) - a p
        terms_NV = log_ratio_NV.neg_().add_(1).mul_(down_NV).sub_(up_NV)
        return loss_N, _minus_expectation_(terms_NV, q_NV, terms_NV.sum(-1))


@dataclass(frozen=True, kw_only=True)
class InterpolatedForwardKL:
    """TAID: - sum p_t log q, p_t = softmax((1 - t) sg(student) + t teacher) (Shing et al., 2025).

    sg is the stop-gradient. The value is the cross-entropy part of KL(p_t || q), as in the authors' code; the
    gradient in the student logits, q - p_t, is that of the KL. There is no temperature. At ``t`` = 1 this is
    the soft cross-entropy against the teacher, at ``t`` = 0 the gradient is exactly zero.

    Raises ``ValueError`` unless 0 <= ``t`` <= 1.
    """

    t: float

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must lie between 0 and 1, got {self.t}")

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        """Loss of every row: (..., V), (..., V) -> (...)."""
        dtype = _working_dtype(student_logits_NV, teacher_logits_NV)
        z_s_NV, z_p_NV = student_logits_NV.to(dtype), teacher_logits_NV.to(dtype)
        z_s_NV = z_s_NV - z_s_NV.detach().amax(-1, keepdim=True)
        z_t_NV = torch.lerp(z_s_NV.detach(), z_p_NV, self.t)
        p_t_NV = (z_t_NV - z_t_NV.logsumexp(-1, keepdim=True)).exp()
        # Not log_softmax: the gradient of logsumexp repeats p_t bit for bit at t = 0, so that q - p_t is 0.
        return z_s_NV.logsumexp(-1) - (p_t_NV * z_s_NV).sum(-1)

    @torch.no_grad()
    def value_and_grad(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss of every row and its gradient in the student logits: (..., V), (..., V) -> (...), (..., V)."""
        dtype = _working_dtype(student_logits_NV, teacher_logits_NV)
        z_s_NV, z_p_NV = student_logits_NV.to(dtype), teacher_logits_NV.to(dtype)
        z_t_NV = torch.lerp(z_s_NV, z_p_NV, self.t, out=z_p_NV if overwrite else None)
        p_t_NV = log_softmax(z_t_NV, overwrite=True).exp_()
        log_q_NV = log_softmax(z_s_NV, overwrite=overwrite)
        q_NV = log_q_NV.exp()
        return -log_q_NV.mul_(p_t_NV).sum(-1), q_NV.sub_(p_t_NV)


def reduce(
    loss_N: Tensor, *, weight: Tensor | None = None, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    """Weigh per-row losses and reduce them: (...) -> scalar, or (...) with ``reduction="none"``.

    ``weight`` (shape of ``loss_N``; bool or any real type) is a mask, token weights, or their product. "mean"
    is sum(w l) / sum(w), and 0 with zero gradients when every weight is 0. Rows of weight 0 are left out even
    if their loss is not finite.

    Raises ``ValueError`` on an unknown reduction or a weight of another shape.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if weight is None:
        total = loss_N if reduction == "none" else loss_N.sum()
        return total / max(1, loss_N.numel()) if reduction == "mean" else total
    if weight.shape != loss_N.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the losses {tuple(loss_N.shape)}")
    weight_N = weight.to(loss_N.dtype)
    weighted_N = weight_N * loss_N.where(weight_N != 0, 0)
    if reduction == "none":
        return weighted_N
    if reduction == "sum":
        return weighted_N.sum()
    return weighted_N.sum() / total_weight(weight_N)


def total_weight(weight_N: Tensor) -> Tensor:
    """What "mean" divides by: the sum of the weights, or 1 where they are all 0."""
    total = weight_N.sum()
    return total.where(total != 0, 1)


def align_vocabulary(
    student_logits: Tensor, teacher_logits: Tensor, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cut both logits to the real vocabulary: (..., V), (..., W) -> (..., vocab_size) twice, as views.

    Models of one family pad their output layers differently (Qwen2.5: 152,064 beside 151,936 columns). With
    ``vocab_size=None`` the smaller of the two widths is kept.

    Raises ``ValueError`` if ``vocab_size`` is below 1 or exceeds either width.
    """
    size = common_vocabulary(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    return student_logits[..., :size], teacher_logits[..., :size]


def common_vocabulary(student_size: int, teacher_size: int, vocab_size: int | None = None) -> int:
    """The vocabulary size that two output layers share; see ``align_vocabulary``."""
    smaller = min(student_size, teacher_size)
    if vocab_size is None:
        return smaller
    if not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size must lie between 1 and {smaller}, got {vocab_size} "
            f"(the student has {student_size} outputs, the teacher {teacher_size})"
        )
    return vocab_size


def log_softmax(logits_NV: Tensor, *, temperature: float = 1.0, overwrite: bool = False) -> Tensor:
    """log softmax(logits / temperature); without grad, ``overwrite`` lets it take the memory of the logits."""
    if temperature != 1.0:
        logits_NV = logits_NV.div_(temperature) if overwrite else logits_NV / temperature
        overwrite = True
    # The CPU kernel writes an element only after its last read of it; other devices' kernels promise no such thing.
    in_place = overwrite and logits_NV.device.type == "cpu" and not torch.is_grad_enabled()
    return torch.log_softmax(logits_NV, -1, out=logits_NV if in_place else None)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def _minus_expectation_(terms_NV: Tensor, q_NV: Tensor, sum_N: Tensor) -> Tensor:
    """Through the softmax, in place: with terms = q d loss/d q, the gradient is terms - q sum(terms)."""
    return terms_NV.addcmul_(q_NV, sum_N.unsqueeze(-1), value=-1)


def _log(m_NV: Tensor) -> Tensor:
    """log m of a mixture; where m underflows both p and q do, and their terms vanish whatever stands here."""
    return m_NV.clamp_min(torch.finfo(m_NV.dtype).tiny).log()


def _log_(m_NV: Tensor) -> Tensor:
    return m_NV.clamp_min_(torch.finfo(m_NV.dtype).tiny).log_()


def _power_difference(a_NV: Tensor, b_NV: Tensor, c: float, d_NV: Tensor) -> Tensor:
    """(e^a - e^b) / c for a - b = c d, and its limit e^a d at c = 0, without overflow or cancellation."""
    if c == 0:
        return a_NV.exp() * d_NV
    gap_NV = c * d_NV
    return torch.maximum(a_NV, b_NV).exp() * torch.expm1(-gap_NV.abs()) * gap_NV.sign() / -c


def _check_skew(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
