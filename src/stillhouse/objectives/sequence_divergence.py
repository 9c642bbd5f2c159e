"""The divergence of whole responses, as a policy gradient.

Shapes: B rows (prompt and response), T tokens, N response tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import response_tokens
from stillhouse.losses.divergences import ReverseKL
from stillhouse.losses.policy_gradient import clipped_surrogate, later_in_row
from stillhouse.losses.sparse_divergence import linear_topk_divergence
from stillhouse.losses.token_logprobs import Head, head_divergence, token_logprobs
from stillhouse.objectives.language import LanguageHead
from stillhouse.objectives.responses import opened


class SequenceReverseKL(Term):
    """KL(student || teacher) of responses that the student wrote (MiniLLM, Gu et al., 2024, arXiv 2306.08543, eq. 8).

    The gradient is split in two: ``SingleStep``, the exact reverse KL of every token's distribution, and ``Long``, the
    policy gradient with R, the mean of log p/q over the tokens after y_t, as its reward: -w min(rho R, clip(rho) R)
    with rho = q / q_old (algorithm 1 there, with PPO's sign; 1 on text that was just written). Both are averages over
    the batch's response tokens.

    Text that the student wrote a while ago comes with ``old_logp``, log q_old, and ``gain``, log p/q_old, both (N) and
    as it was written: R and w are from then, as in the authors' code.

    Args:
        student, teacher: output heads. Without a teacher the batch says what it thinks: ``gain`` and ``old_logp``, and
            of every token's place its K likeliest, ``teacher_tokens`` and ``teacher_log_p`` (N, K), and what is left,
            ``teacher_log_rest`` (N); ``SingleStep`` then compares K + 1 outcomes.
        teacher_share: of the mixture ``(1 - share) q + share p`` that the tokens were drawn from; each is weighed by
            w = q / mixture, the paper's approximation of the whole prefix's ratio.
        length_normalised: R is the mean over what comes after; if not, the sum (the exact gradient, where share is 0).
        clip: rho beyond 1 +- this moves nothing where the reward wants it further; None: it always does.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead | None,
        *,
        teacher_share: float = 0.2,
        length_normalised: bool = True,
        clip: float | None = 0.2,
        vocab_size: int | None = None,
        name: str = "SingleStep",
    ) -> None:
        signals = student.signals("student") | (teacher.signals("teacher", detach=True) if teacher else {})
        super().__init__(name=name, **signals)
        self.heads = (student, teacher)
        self.teacher_share = teacher_share
        self.length_normalised = length_normalised
        self.clip = {"clip_low": 1.0, "clip_high": math.inf} if clip is None else {"clip_low": clip, "clip_high": clip}
        self.vocab_size = vocab_size

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> list[TermValue]:
        at_BT, label_N, row_N = response_tokens(batch)
        student_BTD, student = opened(self.heads[0], "student", tensors)
        hidden_ND = student_BTD[at_BT]
        logp_N = token_logprobs(hidden_ND, student, label_N)
        teacher = None
        if self.heads[1] is not None:
            teacher_BTE, layer = opened(self.heads[1], "teacher", tensors)
            teacher = (teacher_BTE[at_BT], layer)
        with torch.no_grad():
            if "old_logp" in batch:
                old_N, gain_N = batch["old_logp"], batch["gain"]
            else:
                assert teacher is not None
                old_N, gain_N = logp_N.detach(), token_logprobs(*teacher, label_N) - logp_N
            weight_N = self._weights(gain_N)
            later_N, count_N = later_in_row(gain_N, row_N)
            R_N = later_N / count_N.clamp(min=1) if self.length_normalised else later_N
        long_N = clipped_surrogate(logp_N, old_N, R_N, **self.clip)
        single = self._single_step(hidden_ND, student, teacher, batch, weight_N)
        tokens = max(1, len(label_N))
        with torch.no_grad():
            rho_N = torch.exp(logp_N - old_N)
            outside_N = (rho_N < 1 - self.clip["clip_low"]) | (rho_N > 1 + self.clip["clip_high"])
            self.log("kl", (logp_N - old_N - gain_N).sum() / tokens)
            self.log("weight", weight_N.sum() / tokens)
            self.log("clipped", outside_N.sum() / tokens)
        return [TermValue(self.name, single / tokens), TermValue("Long", (weight_N * long_N).sum() / tokens)]

    def _single_step(
        self,
        hidden_ND: Tensor,
        student: Head,
        teacher: tuple[Tensor, Head] | None,
        batch: Batch,
        weight_N: Tensor,
    ) -> Tensor:
        """The tokens' reverse KLs, weighed and summed."""
        common: dict[str, Any] = {"weight_N": weight_N, "vocab_size": self.vocab_size, "reduction": "sum"}
        if teacher is None:
            return linear_topk_divergence(
                hidden_ND,
                student.weight,
                *(batch[f"teacher_{name}"] for name in ("tokens", "log_p", "log_rest")),
                divergence=ReverseKL(),
                student_bias_V=student.bias,
                student_logit_scale=student.scale,
                student_softcap=student.softcap,
                **common,
            ).loss
        return head_divergence(hidden_ND, student, *teacher, divergence=ReverseKL(), **common).loss

    def _weights(self, gain_N: Tensor) -> Tensor:
        """q / ((1 - share) q + share p), from log p / q."""
        share = self.teacher_share
        if not share:
            return torch.ones_like(gain_N)
        own_N = torch.full_like(gain_N, math.log1p(-share))
        return torch.exp(-torch.logaddexp(own_N, gain_N + math.log(share)))
