"""Distillation and cross-entropy losses fused with the output layer: full logits never exist.

Shapes: N tokens (any leading shape, e.g. BT), D student width, E teacher width, V vocabulary, C tokens of one
chunk.

The logits of one chunk of tokens are computed, compared, turned into gradients of the hidden states and of the
output layer, and dropped, all in the forward pass; the backward pass only scales what is there. Peak extra
memory is a few times C x V plus the gradient of the output layer, whatever N is, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from stillhouse.losses.divergences import RowDivergence, common_vocabulary, value_and_grad

IGNORE_INDEX = -100
# One chunk's float32 logits. On a CPU they should stay near the caches; an accelerator needs some hundred rows
# for its matrix products to hide reading and writing the weight gradient.
CHUNK_BYTES_CPU = 16 * 2**20
CHUNK_BYTES_ACCELERATOR = 256 * 2**20


class LinearDivergence(NamedTuple):
    """What ``linear_divergence`` returns: three scalars, of which only ``loss`` carries gradients.

    ``divergence`` and ``cross_entropy`` are the reduced terms before their weights; ``cross_entropy`` is None
    without labels.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None


def linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    divergence: RowDivergence,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    labels_N: Tensor | None = None,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    weight_N: Tensor | None = None,
    label_weight_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> LinearDivergence:
    """Divergence between two models' token distributions, and cross-entropy, straight from hidden states.

    Equals, without holding any (N, V) tensor,

        logits        = cap(scale * (hidden @ weight.T + bias)),   cap(z) = softcap * tanh(z / softcap)
        divergence    = reduce(divergence(student_logits, teacher_logits), weight=weight_N)
        cross_entropy = reduce(cross_entropy(student_logits, labels_N), weight=label_weight_N)
        loss          = divergence_weight * divergence + cross_entropy_weight * cross_entropy

    with gradients for the student's hidden states, weight and bias, as far as they require them, and none for
    the teacher. Hidden states are (..., D) and (..., E); labels and weights have their leading shape.

    - ``divergence``: a class of ``stillhouse.losses.divergences``, or any callable that returns one loss per
      row; it sees float32 (or float64) logits. Nothing inside it is trained.
    - ``labels_N``: the token that each hidden state predicts (already shifted); -100 is left out. With labels
      the cross-entropy is measured even where its weight is 0; the same holds for the divergence.
    - ``weight_N``: token weights or mask (bool or real). ``label_weight_N`` is the same for the labels and
      defaults to ``weight_N``. Tokens that neither counts are gathered out first and cost nothing.
    - ``vocab_size``: cut both models to the real vocabulary; by default to the smaller of the two.
    - ``chunk_tokens``: tokens per chunk; by default logits of 16 MiB on a CPU and 256 MiB elsewhere.
    - ``reduction``: "mean" divides each term by the sum of its weights (0 if all are 0), "sum" does not.

    Under autocast the matrix products run in its dtype. The gradient of a half-precision weight is summed over
    chunks in float32. The result is differentiable once. Raises ``ValueError`` on shapes that do not fit,
    labels outside the vocabulary, a divergence that does not return one loss per row, or one that is a module
    with trainable parameters.

    After the fused losses of Liger Kernel (Hsu et al., 2024, arXiv 2410.10989, section 3.2) and Cut
    Cross-Entropy (Wijmans et al., 2025, arXiv 2411.09009); logit soft-capping as in Gemma 2 (arXiv 2408.00118).
    """
    if isinstance(divergence, torch.nn.Module) and any(p.requires_grad for p in divergence.parameters()):
        raise ValueError("divergence has trainable parameters, which get no gradient here; freeze them")
    size = common_vocabulary(student_weight_VD.shape[0], teacher_weight_VE.shape[0], vocab_size)
    teacher = _Head(
        teacher_weight_VE.detach(), _detach(teacher_bias_V), teacher_logit_scale, teacher_softcap, size
    )
    return _linear_loss(
        student_hidden_ND,
        _Head(student_weight_VD, student_bias_V, student_logit_scale, student_softcap, size),
        teacher=(teacher_hidden_NE.detach(), teacher, divergence),
        labels=labels_N,
        weights=(divergence_weight, cross_entropy_weight),
        row_weight=weight_N,
        label_weight=label_weight_N,
        chunk_tokens=chunk_tokens,
        reduction=reduction,
    )


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy of an output layer from its hidden states (..., D), without full logits: a scalar.

    The teacher-less form of ``linear_divergence``; arguments, precision, errors and sources are described
    there.
    """
    size = common_vocabulary(weight_VD.shape[0], weight_VD.shape[0], vocab_size)
    return _linear_loss(
        hidden_ND,
        _Head(weight_VD, bias_V, logit_scale, softcap, size),
        teacher=None,
        labels=labels_N,
        weights=(0.0, 1.0),
        row_weight=weight_N,
        label_weight=None,
        chunk_tokens=chunk_tokens,
        reduction=reduction,
    ).loss


@dataclass(frozen=True)
class _Head:
    """An output layer: cap(scale * (hidden @ weight[:size].T + bias[:size]))."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    size: int

    def to(self, dtype: torch.dtype | None) -> _Head:
        weight_VD, bias_V = self.weight_VD[: self.size], self.bias_V
        if bias_V is not None:
            bias_V = bias_V[: self.size].to(dtype or bias_V.dtype)
        return _Head(weight_VD.to(dtype or weight_VD.dtype), bias_V, self.scale, self.softcap, self.size)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        z_CV = F.linear(hidden_CD, self.weight_VD, self.bias_V)
        z_CV = z_CV.float() if z_CV.dtype in (torch.bfloat16, torch.float16) else z_CV
        if self.scale != 1.0:
            z_CV.mul_(self.scale)
        if self.softcap is not None:
            z_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_CV

    def through_cap_(self, grad_CV: Tensor, z_CV: Tensor) -> Tensor:
        """Gradient in front of the soft cap, in place (``z_CV`` is used up); ``scale`` is left to the caller."""
        if self.softcap is None:
            return grad_CV
        return grad_CV.mul_(z_CV.div_(self.softcap).square_().neg_().add_(1))


@dataclass(frozen=True)
class _Work:
    """Everything but the student: N rows to go through, and how much each counts."""

    teacher: tuple[Tensor, _Head, RowDivergence] | None
    labels_N: Tensor | None
    divergence_scale_N: Tensor
    label_scale_N: Tensor
    chunk_tokens: int
    autocast: torch.dtype | None


class _Result(NamedTuple):
    divergence_N: Tensor
    cross_entropy_N: Tensor
    grad_hidden_ND: Tensor | None
    grad_weight_VD: Tensor | None
    grad_bias_V: Tensor | None


def _linear_loss(
    hidden: Tensor,
    student: _Head,
    *,
    teacher: tuple[Tensor, _Head, RowDivergence] | None,
    labels: Tensor | None,
    weights: tuple[float, float],
    row_weight: Tensor | None,
    label_weight: Tensor | None,
    chunk_tokens: int | None,
    reduction: Literal["mean", "sum"],
) -> LinearDivergence:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if labels is None and weights[1] != 0:
        raise ValueError("cross_entropy_weight needs labels_N")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    rows = hidden.shape[:-1]
    named = {"labels_N": labels, "weight_N": row_weight, "label_weight_N": label_weight}
    if teacher is not None:
        named["the teacher's hidden states"] = teacher[0][..., 0]
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != rows:
            raise ValueError(f"{name}: leading shape {tuple(tensor.shape)}, the hidden states {tuple(rows)}")

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    ones_N = torch.ones(len(hidden_ND), dtype=dtype, device=hidden.device)
    weight_N = ones_N if row_weight is None else row_weight.reshape(-1).to(dtype)
    label_weight_N = weight_N if label_weight is None else label_weight.reshape(-1).to(dtype)
    if labels is None:
        label_weight_N = torch.zeros_like(ones_N)
    else:
        labels = labels.reshape(-1)
        label_weight_N = label_weight_N.where(labels != IGNORE_INDEX, 0)
    if teacher is None:
        weight_N = torch.zeros_like(ones_N)
    else:
        teacher = (teacher[0].reshape(-1, teacher[0].shape[-1]), *teacher[1:])

    keep_N = (weight_N != 0) | (label_weight_N != 0)
    if not bool(keep_N.all()):
        hidden_ND, weight_N, label_weight_N = hidden_ND[keep_N], weight_N[keep_N], label_weight_N[keep_N]
        labels = None if labels is None else labels[keep_N]
        teacher = None if teacher is None else (teacher[0][keep_N], *teacher[1:])
    if labels is not None:
        labels = labels.where(label_weight_N != 0, 0)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < student.size:
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, outside the vocabulary of "
                f"{student.size} entries (and not {IGNORE_INDEX})"
            )

    divergence_norm, label_norm = torch.ones_like(ones_N[:0].sum()), torch.ones_like(ones_N[:0].sum())
    if reduction == "mean":
        divergence_norm, label_norm = _sum_or_one(weight_N), _sum_or_one(label_weight_N)
    # Gradients are kept before the division by the norm, where half precision has room for them.
    norm = label_norm if teacher is None or weights[0] == 0 else divergence_norm
    device = hidden.device.type
    work = _Work(
        teacher=teacher,
        labels_N=labels,
        divergence_scale_N=weight_N * (weights[0] * norm / divergence_norm),
        label_scale_N=label_weight_N * (weights[1] * norm / label_norm),
        chunk_tokens=chunk_tokens or _default_chunk(student.size, dtype, device),
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    loss, divergence_N, cross_entropy_N = _HeadLoss.apply(
        hidden_ND, student.weight_VD, student.bias_V, student, work, norm, torch.is_grad_enabled()
    )
    cross_entropy = (label_weight_N * cross_entropy_N).sum() / label_norm
    return LinearDivergence(
        loss, (weight_N * divergence_N).sum() / divergence_norm, None if labels is None else cross_entropy
    )


class _HeadLoss(torch.autograd.Function):
    """The loss of all rows; its gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        student: _Head,
        work: _Work,
        norm: Tensor,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need = tuple(
            training and tensor is not None and tensor.requires_grad
            for tensor in (hidden_ND, weight_VD, bias_V)
        )
        with torch.autocast(hidden_ND.device.type, enabled=False):
            result = _run(hidden_ND, student, work, need)
        loss = (
            work.divergence_scale_N @ result.divergence_N + work.label_scale_N @ result.cross_entropy_N
        ) / norm
        ctx.save_for_backward(*result[2:], student.scale / norm)
        ctx.mark_non_differentiable(result.divergence_N, result.cross_entropy_N)
        return loss, result.divergence_N, result.cross_entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *grads, scale = ctx.saved_tensors
        scale = scale * grad_loss
        return (*(None if grad is None else grad * scale for grad in grads), None, None, None, None)


def _run(hidden_ND: Tensor, student: _Head, work: _Work, need: tuple[bool, ...]) -> _Result:
    """Row losses, and the gradients of sum(scale * loss) that are needed, one chunk of rows at a time."""
    N = len(hidden_ND)
    need_hidden, need_weight, need_bias = need
    compute = _compute_dtype(hidden_ND, work.autocast)
    head = student.to(compute)
    accumulate = torch.promote_types(student.weight_VD.dtype, torch.float32)
    grad_hidden_ND = torch.zeros_like(hidden_ND) if need_hidden else None
    grad_weight_VD = torch.zeros_like(student.weight_VD, dtype=accumulate) if need_weight else None
    grad_bias_V = None
    if need_bias and student.bias_V is not None:
        grad_bias_V = torch.zeros_like(student.bias_V, dtype=accumulate)
    divergence_N = torch.zeros_like(work.divergence_scale_N)
    cross_entropy_N = torch.zeros_like(work.label_scale_N)
    if work.teacher is not None:
        teacher_hidden_NE, teacher_head, divergence = work.teacher
        teacher_compute = _compute_dtype(teacher_hidden_NE, work.autocast)
        teacher_head = teacher_head.to(teacher_compute)

    for chunk in _chunks(N, work.chunk_tokens):
        hidden_CD = hidden_ND[chunk].to(compute)
        z_CV = head.logits(hidden_CD)
        grad_CV: Tensor | None = None
        row_scale_C = None
        if work.teacher is not None:
            teacher_z_CV = teacher_head.logits(teacher_hidden_NE[chunk].to(teacher_compute))
            if any(need):
                loss_C, grad_CV = value_and_grad(divergence, z_CV, teacher_z_CV)
            else:
                loss_C = divergence(z_CV, teacher_z_CV)
            divergence_N[chunk] = loss_C
        if work.labels_N is not None:
            ...
    return _Result(divergence_N, cross_entropy_N, grad_hidden_ND, grad_weight_VD, grad_bias_V)
