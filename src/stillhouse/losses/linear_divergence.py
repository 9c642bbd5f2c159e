"""Distillation and cross-entropy losses fused with the output layer: full logits never exist.

Shapes: N tokens (any leading shape, e.g. BT), C tokens of one chunk, R rows of one block of it, D student width,
E teacher width, V vocabulary, 1 an axis of size one.

The logits of one chunk of tokens are computed, compared, turned into gradients of the hidden states and of the
output layer, and dropped, all in the forward pass; the backward pass only scales what is there. Peak extra
memory is two chunks of logits (C x V; student and teacher) plus the gradient of the output layer (twice, while
the backward pass scales it), whatever N is, and nothing is computed twice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.losses.divergences import (
    LabelledDivergence,
    RowDivergence,
    common_vocabulary,
    log_softmax,
    reduce,
    total_weight,
    value_and_grad,
)

Reduction = Literal["mean", "sum"]

IGNORE_INDEX = -100
# A chunk of logits goes through the matrix products, a block of it through the row losses. Chunks need some hundred
# rows, so that the products run at full speed and hide the reading and writing of the weight gradient. Blocks keep
# small what the row losses compute on the way; much smaller ones than these pay for starting threads or kernels,
# dearly so on a CPU whose cores are shared.
CHUNK_BYTES_CPU, BLOCK_BYTES_CPU = 48 * 2**20, 16 * 2**20
CHUNK_BYTES_ACCELERATOR, BLOCK_BYTES_ACCELERATOR = 256 * 2**20, 64 * 2**20


class LinearDivergence(NamedTuple):
    """What ``linear_divergence`` returns: scalars, of which only ``loss`` carries gradients.

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
    reduction: Reduction = "mean",
) -> LinearDivergence:
    """Divergence between two models' next-token distributions, and cross-entropy, straight from hidden states.

    Equals, without holding any (N, V) tensor,

        logits        = cap(scale * (hidden @ weight.T + bias)),   cap(z) = softcap * tanh(z / softcap)
        divergence    = reduce(divergence(student_logits, teacher_logits), weight=weight_N)
        cross_entropy = reduce(cross_entropy(student_logits, labels_N), weight=label_weight_N)
        loss          = divergence_weight * divergence + cross_entropy_weight * cross_entropy

    with gradients for the student's hidden states, weight and bias, as far as they require them, and none for
    the teacher. Hidden states are (..., D) and (..., E); labels and weights have their leading shape.

    - ``divergence``: a class of ``stillhouse.losses.divergences``, or any callable that returns one loss per
      row; it sees float32 (or float64) logits. Nothing inside it is trained. One that asks for labels
      (``stillhouse.losses.target_split``) gets ``labels_N``, and counts only where there is one.
    - ``labels_N``: the token that each hidden state predicts (already shifted); -100 is left out. With labels
      the cross-entropy is measured even where its weight is 0, and so is the divergence.
    - ``weight_N``: token weights or mask (bool or real). ``label_weight_N`` is the same for the labels and
      defaults to ``weight_N``. Tokens that count in neither are gathered out first and cost nothing.
    - ``vocab_size``: cut both models to the real vocabulary; by default to the smaller of the two.
    - ``chunk_tokens``: tokens per chunk; by default logits of 48 MiB on a CPU and 256 MiB elsewhere.
    - ``reduction``: "mean" divides each term by the sum of its weights (0 if all are 0), "sum" does not.

    Under autocast the matrix products run in its dtype and the rest in float32. The gradient of a
    half-precision weight is summed over chunks in float32.

    Raises ``ValueError`` on shapes that do not fit, labels outside the vocabulary, a divergence that does not
    return one loss per row, asks for labels where there are none, or is a module with trainable parameters;
    ``RuntimeError`` on a backward pass with ``create_graph=True``.

    After the fused losses of Liger Kernel (Hsu et al., 2024, arXiv 2410.10989) and Cut Cross-Entropy (Wijmans
    et al., 2024, arXiv 2411.09009); logit soft-capping as in Gemma 2 (arXiv 2408.00118).
    """
    if isinstance(divergence, torch.nn.Module) and any(p.requires_grad for p in divergence.parameters()):
        raise ValueError("divergence has trainable parameters, which would get no gradient here; freeze them")
    if labels_N is None and cross_entropy_weight != 0:
        raise ValueError("cross_entropy_weight needs labels_N")
    labelled = isinstance(divergence, LabelledDivergence)
    if labelled and labels_N is None:
        raise ValueError(f"{type(divergence).__name__} asks for labels; pass labels_N")
    shape = student_hidden_ND.shape[:-1]
    _check_shape("the teacher's hidden states", teacher_hidden_NE.shape[:-1], shape)
    size = common_vocabulary(student_weight_VD.shape[0], teacher_weight_VE.shape[0], vocab_size)
    student = OutputLayer(student_weight_VD, student_bias_V, student_logit_scale, student_softcap, size)
    teacher = OutputLayer(teacher_weight_VE, teacher_bias_V, teacher_logit_scale, teacher_softcap, size)
    terms: list[RowTerm] = []
    row_weight_N, own_labels_N = row_weights("weight_N", weight_N, student_hidden_ND), None
    if labels_N is not None:
        label_weight_N = row_weights(
            "label_weight_N", weight_N if label_weight_N is None else label_weight_N, student_hidden_ND
        )
        terms.append(label_term(labels_N, label_weight_N, shape, size, cross_entropy_weight))
        if labelled:
            checked = label_term(labels_N, row_weight_N, shape, size, 1.0)
            row_weight_N, own_labels_N = checked.row_weight, checked.labels
    terms.append(
        _TeacherTerm(
            hidden=teacher_hidden_NE.detach().flatten(0, -2),
            head=teacher,
            divergence=divergence,
            labels=own_labels_N,
            row_weight=row_weight_N,
            coefficient=divergence_weight,
        )
    )
    loss, values = linear_loss(student_hidden_ND, student, terms, chunk_tokens, reduction)
    return LinearDivergence(loss, values[-1], values[0] if labels_N is not None else None)


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
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of an output layer from its hidden states (..., D), without full logits: a scalar.

    The teacher-less form of ``linear_divergence``; arguments, precision, errors and sources are described
    there.
    """
    size = common_vocabulary(weight_VD.shape[0], weight_VD.shape[0], vocab_size)
    row_weight_N = row_weights("weight_N", weight_N, hidden_ND)
    term = label_term(labels_N, row_weight_N, hidden_ND.shape[:-1], size, 1.0)
    head = OutputLayer(weight_VD, bias_V, logit_scale, softcap, size)
    loss, _ = linear_loss(hidden_ND, head, [term], chunk_tokens, reduction)
    return loss


def default_tokens(vocab_size: int, device: torch.device) -> tuple[int, int]:
    """How many tokens' float32 logits fill a chunk and a block on this kind of device."""
    on_cpu = device.type == "cpu"
    chunk_bytes = CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES_ACCELERATOR
    block_bytes = BLOCK_BYTES_CPU if on_cpu else BLOCK_BYTES_ACCELERATOR
    return max(1, chunk_bytes // (4 * vocab_size)), max(1, block_bytes // (4 * vocab_size))


@dataclass(frozen=True)
class OutputLayer:
    """An output layer of ``size`` entries: cap(scale * (hidden @ weight.T + bias)), weight (V, D), bias (V)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    size: int

    def ready(self, autocast: torch.dtype | None) -> OutputLayer:
        """The layer cut to its size and cast as autocast would."""
        bias_V = None if self.bias is None else _cast(self.bias[: self.size], autocast)
        return replace(self, weight=_cast(self.weight[: self.size], autocast), bias=bias_V)

    def logits(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """The logits of some rows, written into memory of at least float32."""
        if self.weight.dtype != out_CV.dtype:
            out_CV.copy_(F.linear(hidden_CD, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden_CD, self.weight.T, out=out_CV)
        else:
            torch.addmm(self.bias, hidden_CD, self.weight.T, out=out_CV)
        if self.scale != 1.0:
            out_CV.mul_(self.scale)
        if self.softcap is not None:
            out_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return out_CV

    def cap_slope(self, z_CV: Tensor) -> Tensor | None:
        """Slope of the soft cap where it gave these logits."""
        return None if self.softcap is None else (z_CV / self.softcap).square_().neg_().add_(1)


@dataclass(frozen=True, kw_only=True)
class RowTerm:
    """A row loss on the student's logits: ``row_weight`` (N) weighs the rows, ``coefficient`` the term.

    `linear_loss` takes several at once; a subclass says what logits are compared with, and how.
    """

    row_weight: Tensor
    coefficient: float

    def keep(self, keep_N: Tensor) -> Self:
        """The term on some of its rows."""
        raise NotImplementedError

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        """The term with its tensors cast as autocast would, and memory for a chunk of logits."""
        raise NotImplementedError

    def at(self, rows: slice) -> Self:
        """The term as it judges these rows, where it does not judge all alike."""
        return self

    def target(self, chunk: slice) -> Tensor:
        """What the student's logits in these rows are compared with; valid until the next chunk."""
        raise NotImplementedError

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        """Loss of every row: (C)."""
        raise NotImplementedError

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        """The same and its gradient in the logits, (C, V); may use up the target, and the logits if told so."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _TeacherTerm(RowTerm):
    hidden: Tensor
    head: OutputLayer
    divergence: RowDivergence
    labels: Tensor | None = None  # of every row, where the divergence asks for them
    memory: Tensor | None = None

    def keep(self, keep_N: Tensor) -> Self:
        labels = None if self.labels is None else self.labels[keep_N]
        return replace(self, row_weight=self.row_weight[keep_N], hidden=self.hidden[keep_N], labels=labels)

    def at(self, rows: slice) -> Self:
        if self.labels is None or not isinstance(self.divergence, LabelledDivergence):
            return self
        return replace(self, divergence=self.divergence.given(self.labels[rows]))

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        hidden = _cast(self.hidden, autocast)
        return replace(self, hidden=hidden, head=self.head.ready(autocast), memory=torch.empty_like(like_CV))

    def target(self, chunk: slice) -> Tensor:
        assert self.memory is not None
        return self.head.logits(self.hidden[chunk], self.memory[: chunk.stop - chunk.start])

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        return self._by_row(self.divergence(z_CV, target_C), z_CV)

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        z_CV = z_CV if overwrite else z_CV.clone()
        loss_C, grad_CV = value_and_grad(self.divergence, z_CV, target_C, overwrite=True)
        return self._by_row(loss_C, z_CV), grad_CV

    def _by_row(self, loss_C: Tensor, z_CV: Tensor) -> Tensor:
        if loss_C.shape != z_CV.shape[:-1]:
            made = f"{tuple(loss_C.shape)} from logits of shape {tuple(z_CV.shape)}"
            raise ValueError(f"divergence must return one loss per row; it returned shape {made}")
        return loss_C


@dataclass(frozen=True, kw_only=True)
class LabelTerm(RowTerm):
    """Cross-entropy to ``labels`` (N); `label_term` makes it."""

    labels: Tensor

    def keep(self, keep_N: Tensor) -> Self:
        return replace(self, row_weight=self.row_weight[keep_N], labels=self.labels[keep_N])

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        return self

    def target(self, chunk: slice) -> Tensor:
        return self.labels[chunk]

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        return F.cross_entropy(z_CV, target_C, reduction="none")

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        target_C1 = target_C.unsqueeze(-1)
        log_q_CV = log_softmax(z_CV, overwrite=overwrite)
        loss_C = -log_q_CV.gather(-1, target_C1).squeeze(-1)
        q_CV = log_q_CV.exp_()
        return loss_C, q_CV.scatter_add_(-1, target_C1, q_CV.new_full(target_C1.shape, -1))


def linear_loss(
    hidden: Tensor, student: OutputLayer, terms: Sequence[RowTerm], chunk_tokens: int | None, reduction: Reduction
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weighted sum of the terms (differentiable) and the value of each term before its coefficient.

    The logits of ``hidden`` (..., D) under ``student`` exist chunk by chunk only, as in `linear_divergence`, where
    ``chunk_tokens`` and ``reduction`` are described.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    hidden_ND = hidden.flatten(0, -2)
    keep_N = torch.stack([term.row_weight != 0 for term in terms]).any(0)
    if not keep_N.all():
        hidden_ND, terms = hidden_ND[keep_N], [term.keep(keep_N) for term in terms]
    default_chunk, default_block = default_tokens(student.size, hidden.device)
    plan = _Plan(
        student=student,
        terms=terms,
        needs_grad=tuple(
            torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
            for tensor in (hidden_ND, student.weight, student.bias)
        ),
        chunk_tokens=chunk_tokens or default_chunk,
        block_tokens=default_block,
        reduction=reduction,
    )
    loss, *values = _LinearLoss.apply(hidden_ND, student.weight, student.bias, plan)
    return loss, tuple(values)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    student: OutputLayer
    terms: Sequence[RowTerm]
    needs_grad: tuple[bool, ...]
    chunk_tokens: int
    block_tokens: int
    reduction: Reduction


class _LinearLoss(torch.autograd.Function):
    """Loss and values of the terms. The gradients are ready when the forward pass ends; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, ...]:
        device_type = hidden_ND.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        terms = plan.terms
        norms = [_norm(term, plan.reduction) for term in terms]
        # The gradients wait for the backward pass undivided by this norm: float16 has no room for 1 / N.
        norm = next((own for term, own in zip(terms, norms, strict=True) if term.coefficient != 0), norms[0])
        scales = [term.row_weight * (term.coefficient * norm / own) for term, own in zip(terms, norms, strict=True)]
        with torch.autocast(device_type, enabled=False):
            losses, grads = _run(hidden_ND, plan, scales, autocast)
        values = [
            reduce(loss_N, weight=term.row_weight, reduction=plan.reduction)
            for term, loss_N in zip(terms, losses, strict=True)
        ]
        loss = torch.stack([term.coefficient * value for term, value in zip(terms, values, strict=True)]).sum()
        ctx.save_for_backward(*grads, plan.student.scale / norm)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_divergence and linear_cross_entropy are differentiable once; for second derivatives "
                "(create_graph=True) apply the divergence to full logits"
            )
        *grads, scale = ctx.saved_tensors
        scale = scale * grad_loss
        return (
            *(
                None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
                for grad, dtype in zip(grads, ctx.dtypes, strict=True)
            ),
            None,
        )


def _run(
    hidden_ND: Tensor, plan: _Plan, scales: Sequence[Tensor], autocast: torch.dtype | None
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Loss of every row by term, and the gradients of sum(scale * loss), in one pass over the chunks."""
    head, hidden_ND = plan.student.ready(autocast), _cast(hidden_ND, autocast)
    losses = [torch.zeros_like(scale_N) for scale_N in scales]
    accumulator = losses[0].dtype
    grad_hidden_ND, grad_weight_VD, grad_bias_V = (
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
        for tensor, dtype, needed in zip(
            (hidden_ND, plan.student.weight, plan.student.bias),
            (hidden_ND.dtype, accumulator, accumulator),
            plan.needs_grad,
            strict=True,
        )
    )
    chunks = _slices(len(hidden_ND), plan.chunk_tokens)
    memory_CV = losses[0].new_empty(max((chunk.stop - chunk.start for chunk in chunks), default=0), head.size)
    terms = [term.ready(autocast, memory_CV) for term in plan.terms]
    learning = [k for k, term in enumerate(terms) if any(plan.needs_grad) and term.coefficient != 0]
    for chunk in chunks:
        z_CV = head.logits(hidden_ND[chunk], memory_CV[: chunk.stop - chunk.start])
        targets = [term.target(chunk) for term in terms]
        for rows in _slices(len(z_CV), plan.block_tokens):
            _row_losses_(
                head,
                z_CV[rows],
                [
                    (
                        term.at(slice(chunk.start + rows.start, chunk.start + rows.stop)),
                        target[rows],
                        loss_N[chunk][rows],
                        scale_N[chunk][rows],
                    )
                    for term, target, loss_N, scale_N in zip(terms, targets, losses, scales, strict=True)
                ],
                learning,
            )
        if not learning:
            continue
        grad_CV, scale_C1 = z_CV.to(hidden_ND.dtype), torch.ones_like(z_CV[:, :1])
        if len(learning) == 1:
            # The row scale of a single term waits for the narrow side of the products: (C, D), not (C, V).
            scale_C1 = scales[learning[0]][chunk].unsqueeze(-1)
        if grad_bias_V is not None:
            grad_bias_V[: head.size].addmv_(z_CV.T, scale_C1.squeeze(-1))
        if grad_hidden_ND is not None:
            grad_hidden_ND[chunk] = (grad_CV @ head.weight).mul_(scale_C1)
        if grad_weight_VD is not None:
            scaled_CD = (hidden_ND[chunk] * scale_C1).to(grad_CV.dtype)
            _add_product_(grad_weight_VD[: head.size], grad_CV.T, scaled_CD)
    return losses, (grad_hidden_ND, grad_weight_VD, grad_bias_V)


def _row_losses_(
    head: OutputLayer,
    z_RV: Tensor,
    work: Sequence[tuple[RowTerm, Tensor, Tensor, Tensor]],
    learning: Sequence[int],
) -> None:
    """Fill in the losses of some rows and replace their logits by the gradient in front of the soft cap.

    ``work`` holds each term with its target, its losses and its scales in these rows. If several terms learn,
    the gradient is that of sum(scale * loss); if one does, that of its plain loss.
    """
    cap_slope_RV = head.cap_slope(z_RV) if learning else None
    grads = []
    for k, (term, target_R, loss_R, scale_R) in enumerate(work):
        if k not in learning:
            loss_R.copy_(term.value(z_RV, target_R))
            continue
        term_loss_R, grad_RV = term.value_and_grad(z_RV, target_R, overwrite=k == len(work) - 1)
        loss_R.copy_(term_loss_R)
        grads.append(grad_RV if len(learning) == 1 else grad_RV.mul_(scale_R.unsqueeze(-1)))
    if grads:
        grad_RV = functools.reduce(Tensor.add_, grads)
        if cap_slope_RV is not None:
            grad_RV.mul_(cap_slope_RV)
        if grad_RV.data_ptr() != z_RV.data_ptr():
            z_RV.copy_(grad_RV)


def _norm(term: RowTerm, reduction: Reduction) -> Tensor:
    return total_weight(term.row_weight) if reduction == "mean" else term.row_weight.new_ones(())


def _slices(n: int, most: int) -> list[slice]:
    """As few slices of at most ``most`` as cover ``n``, of nearly equal length."""
    count = math.ceil(n / most)
    return [slice(k * n // count, (k + 1) * n // count) for k in range(count)]


def _add_product_(sum_VD: Tensor, x_VC: Tensor, y_CD: Tensor) -> None:
    """sum += x @ y, where the sum may be of higher precision than the factors."""
    if sum_VD.dtype == x_VC.dtype:
        sum_VD.addmm_(x_VC, y_CD)
    else:
        sum_VD.add_(x_VC @ y_CD)


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast as autocast does: float64 stays as it is."""
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def label_term(labels: Tensor, weight_N: Tensor, shape: torch.Size, vocab_size: int, coefficient: float) -> LabelTerm:
    """The cross-entropy to ``labels`` (...), of the leading ``shape`` of the hidden states; -100 and rows of weight 0
    are left out. Raises ``ValueError`` on another shape, or a label outside the vocabulary.
    """
    _check_shape("labels_N", labels.shape, shape)
    labels_N = labels.flatten()
    weight_N = weight_N.where(labels_N != IGNORE_INDEX, 0)
    labels_N = labels_N.where(weight_N != 0, 0)
    wrong_N = (labels_N < 0) | (labels_N >= vocab_size)
    if wrong_N.any():
        raise ValueError(f"label {int(labels_N[wrong_N][0])} is outside the vocabulary of {vocab_size} entries")
    return LabelTerm(labels=labels_N, row_weight=weight_N, coefficient=coefficient)


def row_weights(name: str, weight: Tensor | None, hidden: Tensor) -> Tensor:
    """``weight`` (...) as real numbers (N), or ones; it must have the leading shape of ``hidden`` (..., D)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if weight is None:
        return torch.ones(hidden.shape[:-1].numel(), dtype=dtype, device=hidden.device)
    _check_shape(name, weight.shape, hidden.shape[:-1])
    return weight.detach().flatten().to(dtype)


def _check_shape(name: str, shape: torch.Size, expected: torch.Size) -> None:
    if shape != expected:
        raise ValueError(f"{name}: leading shape {tuple(shape)}, but the hidden states have {tuple(expected)}")
