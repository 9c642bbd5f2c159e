"""Reverse KL to a teacher that two frozen models span, token by token, fused with the output layers (AlignDistil).

Shapes: N tokens, C tokens of one chunk, D student width, V vocabulary, 2 the pair of models. ``plus`` is the model to
follow (DPO on preferences), ``minus`` the one to leave (DPO on swapped preferences, or the reference).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from stillhouse.losses.linear_divergence import OutputLayer, RowTerm, linear_loss, row_weights

Origin = Literal["plus", "minus"]


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """How far a teacher lies from its origin, and how strongly it pulls (Zhang et al., 2025, arXiv 2503.02832).

    z* = z_origin + alpha (z_plus - z_minus), alpha = ratio TVD(plus, minus) + floor; the pull is beta0 / alpha. With
    the origin ``minus`` this is the optimum of RLHF under the reward beta0 log(pi_plus / pi_minus), a penalty of
    strength beta0 / alpha and the reference pi_minus: z* = alpha z_plus + (1 - alpha) z_minus. With the origin
    ``plus`` the reference is pi_plus, and every alpha > 0 extrapolates.

    Args:
        ratio: alpha for each unit of total variation.
        floor: alpha where both models agree.
        cap: largest alpha.
        fixed: alpha of all tokens, whatever the distance.
        strength: pull of all tokens; by default beta0 / alpha.
        halved: the total variation is half the sum of the differences; the authors' code leaves out the half.
    """

    ratio: float = 10.0
    floor: float = 1e-3
    cap: float | None = None
    fixed: float | None = None
    beta0: float = 0.1
    strength: float | None = None
    origin: Origin = "plus"
    halved: bool = True

    def alpha(self, tvd_N: Tensor) -> Tensor:
        """Alpha of every token from its total variation: (N)."""
        if self.fixed is not None:
            return torch.full_like(tvd_N, self.fixed)
        alpha_N = self.ratio * (tvd_N if self.halved else 2 * tvd_N) + self.floor
        return alpha_N if self.cap is None else alpha_N.clamp(max=self.cap)

    def beta(self, alpha_N: Tensor) -> Tensor:
        """How strongly every token is pulled: (N)."""
        return self.beta0 / alpha_N if self.strength is None else torch.full_like(alpha_N, self.strength)

    def teacher(self, log_plus_NV: Tensor, log_minus_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(log pi*, total variation) from log-probabilities: (N, V), (N)."""
        tvd_N = (log_plus_NV.exp() - log_minus_NV.exp()).abs().sum(-1) / 2
        origin_NV = log_plus_NV if self.origin == "plus" else log_minus_NV
        alpha_N1 = self.alpha(tvd_N).unsqueeze(-1)
        return (origin_NV + alpha_N1 * (log_plus_NV - log_minus_NV)).log_softmax(-1), tvd_N


class ExtrapolatedKL(NamedTuple):
    """What `linear_extrapolated_kl` returns; only ``loss`` carries gradients."""

    loss: Tensor
    tvd: Tensor  # (N)
    alpha: Tensor  # (N)


@dataclass(frozen=True, kw_only=True)
class _ExtrapolatedTerm(RowTerm):
    hidden: tuple[Tensor, Tensor]  # of both models
    heads: tuple[OutputLayer, OutputLayer]
    how: Extrapolation
    tvd: Tensor  # (N), filled in on the way
    memory: Tensor | None = None

    def keep(self, keep_N: Tensor) -> Self:
        raise ValueError("every row must have a weight: gather those that count first")

    def at(self, rows: slice) -> Self:
        return replace(self, tvd=self.tvd[rows])

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        plus_ND, minus_ND = (
            one if autocast is None or one.dtype == torch.float64 else one.to(autocast) for one in self.hidden
        )
        plus, minus = (head.ready(autocast) for head in self.heads)
        memory_2CV = torch.stack([torch.empty_like(like_CV)] * 2)
        return replace(self, hidden=(plus_ND, minus_ND), heads=(plus, minus), memory=memory_2CV)

    def target(self, chunk: slice) -> Tensor:
        assert self.memory is not None
        for memory_CV, hidden_ND, head in zip(self.memory, self.hidden, self.heads, strict=True):
            head.logits(hidden_ND[chunk], memory_CV[: chunk.stop - chunk.start])
        return self.memory[:, : chunk.stop - chunk.start].transpose(0, 1)

    def _parts(self, z_CV: Tensor, target_C2V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, log q - log pi*, KL, pull)."""
        log_star_CV, tvd_C = self.how.teacher(*target_C2V.log_softmax(-1).unbind(1))
        self.tvd.copy_(tvd_C)
        log_q_CV = z_CV.log_softmax(-1)
        q_CV, gap_CV = log_q_CV.exp(), log_q_CV - log_star_CV
        return q_CV, gap_CV, (q_CV * gap_CV).sum(-1), self.how.beta(self.how.alpha(tvd_C))

    def value(self, z_CV: Tensor, target_C: Tensor) -> Tensor:
        *_, kl_C, beta_C = self._parts(z_CV, target_C)
        return beta_C * kl_C

    def value_and_grad(self, z_CV: Tensor, target_C: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        q_CV, gap_CV, kl_C, beta_C = self._parts(z_CV, target_C)
        return beta_C * kl_C, gap_CV.sub_(kl_C.unsqueeze(-1)).mul_(q_CV).mul_(beta_C.unsqueeze(-1))


def linear_extrapolated_kl(
    student_hidden_ND: Tensor,
    student: OutputLayer,
    plus_hidden_ND: Tensor,
    plus: OutputLayer,
    minus_hidden_ND: Tensor,
    minus: OutputLayer,
    *,
    how: Extrapolation,
    weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> ExtrapolatedKL:
    """sum_t weight_t beta_t KL(q_t || pi*_t), straight from hidden states; the logits exist chunk by chunk only.

    Three chunks of logits are held at a time: the student's and both models'. Gradients flow to the student alone.

    Args:
        weight_N: weights of the tokens, none of them 0: tokens that do not count are left out before.
        how: the teacher and its pull.
        chunk_tokens: tokens in a chunk; see `linear_divergence`.
    """
    size = min(min(head.size, len(head.weight)) for head in (student, plus, minus))
    weight = row_weights("weight_N", weight_N, student_hidden_ND)
    term = _ExtrapolatedTerm(
        row_weight=weight,
        coefficient=1.0,
        hidden=(plus_hidden_ND.detach(), minus_hidden_ND.detach()),
        heads=(replace(plus, size=size), replace(minus, size=size)),
        how=how,
        tvd=torch.zeros_like(weight),
    )
    loss, _ = linear_loss(student_hidden_ND, replace(student, size=size), [term], chunk_tokens, "sum")
    return ExtrapolatedKL(loss, term.tvd, how.alpha(term.tvd))
