"""Log-probabilities of tokens straight from hidden states, with gradients, a chunk of logits at a time.

Shapes: N tokens, C tokens of one chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stillhouse.losses.linear_divergence import LinearDivergence, default_tokens, linear_divergence


class Head(NamedTuple):
    """An output layer: ``cap(scale * (hidden @ weight.T + bias))`` with ``cap(z) = softcap * tanh(z / softcap)``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V), in float32 or float64."""
        z_CV = F.linear(hidden_CD, self.weight, self.bias)
        z_CV = self.scale * (z_CV if z_CV.dtype == torch.float64 else z_CV.float())
        return z_CV if self.softcap is None else self.softcap * torch.tanh(z_CV / self.softcap)


def head_divergence(
    student_ND: Tensor, student: Head, teacher_NE: Tensor, teacher: Head, **options: Any
) -> LinearDivergence:
    """`linear_divergence` of hidden states under two output layers; gradients only for the first."""
    return linear_divergence(
        student_ND,
        student.weight,
        teacher_NE,
        teacher.weight,
        student_bias_V=student.bias,
        teacher_bias_V=teacher.bias,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        **options,
    )


def in_chunks(
    function: Callable[..., Tensor], *rows: Tensor, vocab_size: int, chunk_tokens: int | None = None
) -> Tensor:
    """``function(*rows)``, which must treat rows apart, a chunk of rows at a time.

    Where gradients are wanted and there are several chunks, each is computed again in the backward pass, so that what
    one chunk needs on the way is all the memory that is held.
    """
    size = chunk_tokens or default_tokens(vocab_size, rows[0].device)[0]
    if len(rows[0]) <= size:
        return function(*rows)
    run: Callable[..., Any] = function
    if torch.is_grad_enabled():
        run = lambda *parts: checkpoint(function, *parts, use_reentrant=False)  # noqa: E731
    return torch.cat([run(*parts) for parts in zip(*(row.split(size) for row in rows), strict=True)])


def token_logprobs(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """log p(label | context) of every token: (N).

    ``temperature`` is the one the tokens were sampled at: logits are divided by it.
    """

    def chunk(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return -F.cross_entropy(head.logits(hidden_CD) / temperature, labels_C, reduction="none")

    return in_chunks(chunk, hidden_ND, labels_N, vocab_size=len(head.weight), chunk_tokens=chunk_tokens)
