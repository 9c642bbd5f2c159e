"""Divergences to a teacher of whom only the likeliest tokens are known, straight from hidden states.

Shapes: N tokens (any leading shape, e.g. BT), C tokens of one chunk, D hidden width, V vocabulary, K kept tokens,
L = K + 1 with a bucket for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from stillhouse.losses.divergences import RowDivergence, common_vocabulary, value_and_grad
from stillhouse.losses.linear_divergence import (
    LinearDivergence,
    OutputLayer,
    Reduction,
    RowTerm,
    label_term,
    linear_loss,
    row_weights,
)

Rest = Literal["bucket", "even"]


def bucketed(logits_NV: Tensor, index_NK: Tensor) -> Tensor:
    """Log-probabilities of the indexed tokens and, last, of all others together: (N, K + 1), or (N, K)."""
    log_q_NV = logits_NV.log_softmax(-1)
    kept_NK = log_q_NV.gather(-1, index_NK)
    if index_NK.shape[-1] == logits_NV.shape[-1]:
        return kept_NK
    rest_N1 = log_q_NV.scatter(-1, index_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, rest_N1], -1)


@dataclass(frozen=True, kw_only=True)
class _TopKTerm(RowTerm):
    """A divergence to sparse targets, row by row: index (N, K), log_p (N, K), log_rest (N)."""

    index: Tensor
    log_p: Tensor
    log_rest: Tensor
    divergence: RowDivergence
    rest: Rest
    memory: Tensor | None = None

    def keep(self, keep_N: Tensor) -> Self:
        return replace(
            self,
            row_weight=self.row_weight[keep_N],
            index=self.index[keep_N],
            log_p=self.log_p[keep_N],
            log_rest=self.log_rest[keep_N],
        )

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        return replace(self, memory=torch.empty_like(like_CV) if self.rest == "even" else None)

    def target(self, chunk: slice) -> Tensor:
        """Whole log-probabilities (C, V), or for the bucket (C, 2 K + 1): tokens, their values, the rest's."""
        index_CK, log_p_CK, log_rest_C1 = self.index[chunk], self.log_p[chunk], self.log_rest[chunk].unsqueeze(-1)
        if self.memory is not None:
            out_CV = self.memory[: chunk.stop - chunk.start]
            others = max(1, out_CV.shape[-1] - index_CK.shape[-1])
            out_CV.copy_((log_rest_C1 - math.log(others)).expand_as(out_CV))
            return out_CV.scatter_(-1, index_CK, log_p_CK.to(out_CV.dtype))
        return torch.cat([index_CK.to(torch.float64), log_p_CK.double(), log_rest_C1.double()], -1)

    def _opened(self, z_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
        K = self.index.shape[-1]
        index_CK, log_p_CL = target_C[:, :K].long(), target_C[:, K:].to(z_CV.dtype)
        return index_CK, log_p_CL if z_CV.shape[-1] > K else log_p_CL[:, :K]

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        if self.rest == "even":
            return self.divergence(z_CV, target_C)
        index_CK, log_p_CL = self._opened(z_CV, target_C)
        return self.divergence(bucketed(z_CV, index_CK), log_p_CL)

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        if self.rest == "even":
            z_CV = z_CV if overwrite else z_CV.clone()
            return value_and_grad(self.divergence, z_CV, target_C, overwrite=True)
        index_CK, log_p_CL = self._opened(z_CV, target_C)
        log_q_CL = bucketed(z_CV, index_CK)
        loss_C, grad_CL = value_and_grad(self.divergence, log_q_CL, log_p_CL)
        grad_CL = grad_CL.to(z_CV.dtype)
        # Through log-probabilities: an others' logit moves the bucket by its share of it. Divergences soften what they
        # are given, so their gradients sum to zero and the normaliser takes no part.
        K = index_CK.shape[-1]
        if z_CV.shape[-1] == K:
            return loss_C, torch.empty_like(z_CV).scatter_(-1, index_CK, grad_CL)
        share_CV = z_CV.scatter(-1, index_CK, -math.inf).softmax(-1)
        return loss_C, share_CV.mul_(grad_CL[:, K:]).scatter_(-1, index_CK, grad_CL[:, :K])


def linear_topk_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    index_NK: Tensor,
    log_p_NK: Tensor,
    log_rest_N: Tensor,
    *,
    divergence: RowDivergence,
    rest: Rest = "bucket",
    student_bias_V: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    labels_N: Tensor | None = None,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    weight_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    reduction: Reduction = "mean",
) -> LinearDivergence:
    """`linear_divergence` to a teacher known by its ``K`` likeliest tokens and the rest's mass.

    - ``rest="bucket"``: both sides are compared on K + 1 outcomes, the last being any other token. It is a lower bound
      of the divergence to the whole distribution and asks nothing of how the student ranks the others.
    - ``rest="even"``: the teacher's others share its rest evenly, and all V outcomes are compared.

    ``divergence`` is applied to log-probabilities as if to logits, so that a temperature softens the bucket as one
    outcome. It must not change when a constant is added to a row, as those of `stillhouse.losses.divergences`.
    Everything else as there.
    """
    if rest not in ("bucket", "even"):
        raise ValueError(f"rest must be 'bucket' or 'even', got {rest!r}")
    if labels_N is None and cross_entropy_weight != 0:
        raise ValueError("cross_entropy_weight needs labels_N")
    shape = student_hidden_ND.shape[:-1]
    if index_NK.shape[:-1] != shape or log_p_NK.shape != index_NK.shape or log_rest_N.shape != shape:
        raise ValueError(f"the teacher's tensors have leading shape {tuple(index_NK.shape[:-1])}, not {tuple(shape)}")
    size = common_vocabulary(len(student_weight_VD), len(student_weight_VD), vocab_size)
    if index_NK.numel() and int(index_NK.max()) >= size:
        raise ValueError(f"the teacher's token {int(index_NK.max())} is outside the vocabulary of {size} entries")
    head = OutputLayer(student_weight_VD, student_bias_V, student_logit_scale, student_softcap, size)
    row_weight_N = row_weights("weight_N", weight_N, student_hidden_ND)
    terms: list[RowTerm] = []
    if labels_N is not None:
        terms.append(label_term(labels_N, row_weight_N, shape, size, cross_entropy_weight))
    terms.append(
        _TopKTerm(
            index=index_NK.flatten(0, -2),
            log_p=log_p_NK.flatten(0, -2),
            log_rest=log_rest_N.flatten(),
            divergence=divergence,
            rest=rest,
            row_weight=row_weight_N,
            coefficient=divergence_weight,
        )
    )
    loss, values = linear_loss(student_hidden_ND, head, terms, chunk_tokens, reduction)
    return LinearDivergence(loss, values[-1], values[0] if labels_N is not None else None)
