"""Terms for what a teacher can be asked for about a classifier's inputs: an answer, or its opinion of guesses.

Shapes: B batch, V classes, K guesses. An answer is one class, so its log-probability is also the mean over its length.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.core.objective import Term
from stillhouse.core.observed import Signal
from stillhouse.losses.preference import dpo_loss, pairwise_loss, pro_loss, rrhf_loss

Ranking = Literal["pairwise", "dpo", "rrhf", "pro"]


class TeacherLabels(Term):
    """Cross-entropy of ``student`` (B, V) to the likeliest class of ``teacher`` (B, V).

    Args:
        confidence: what the teacher is less sure of counts nothing (Sohn et al., 2020, FixMatch, arXiv 2001.07685);
            the mean is over all inputs all the same.
    """

    def __init__(self, student: Signal, teacher: Signal, *, confidence: float = 0.0, name: str = "answers") -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())
        self.confidence = confidence

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        sure_B, label_B = teacher.float().softmax(-1).max(-1)
        kept_B = (sure_B >= self.confidence).float()
        self.log("kept", kept_B.mean())
        return (F.cross_entropy(student.float(), label_B, reduction="none") * kept_B).mean()


def draw_guesses(logits_BV: Tensor, count: int) -> Tensor:
    """``count`` distinct classes for each row, drawn one after the other without replacement: (B, K)."""
    noise_BV = -torch.log(-torch.log(torch.rand_like(logits_BV).clamp(1e-10, 1 - 1e-7)))
    return (logits_BV.log_softmax(-1) + noise_BV).topk(count, dim=-1).indices


class RankedGuesses(Term):
    """The teacher ranks some guesses; the student learns from their order.

    Args:
        guesser: logits (B, V) that the guesses are drawn from: the student's own.
        ranking: of the best and the worst guess, ``pairwise`` (Bradley-Terry) or ``dpo``; of all of them ``rrhf`` or
            ``pro``. Beside these two stands the cross-entropy of the best guess, as in their papers: with weight 1 for
            RRHF (Yuan et al., 2023, arXiv 2304.05302, eq. 5), 0.05 (K - 1)^2 for PRO (Song et al., 2023, arXiv
            2306.17492, section 4).
        guesses: K.
        reference: logits of the model that DPO starts from.
        beta: of DPO.
    """

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        guesser: Signal,
        *,
        ranking: Ranking = "pairwise",
        guesses: int = 2,
        reference: Signal | None = None,
        beta: float = 0.1,
        name: str = "feedback",
    ) -> None:
        if ranking == "dpo" and reference is None:
            raise ValueError("dpo needs the model it starts from: reference=")
        optional = {} if reference is None else {"reference": reference.detach()}
        super().__init__(name=name, student=student, teacher=teacher.detach(), guesser=guesser.detach(), **optional)
        self.ranking = ranking
        self.guesses = guesses
        self.beta = beta

    def compute(
        self, *, student: Tensor, teacher: Tensor, guesser: Tensor, reference: Tensor | None = None, **_: Any
    ) -> Tensor:
        guess_BK = draw_guesses(guesser.float(), min(self.guesses, guesser.shape[-1]))
        reward_BK = teacher.float().log_softmax(-1).gather(1, guess_BK)
        logp_BK = student.float().log_softmax(-1).gather(1, guess_BK)
        best_B1, worst_B1 = reward_BK.argmax(1, keepdim=True), reward_BK.argmin(1, keepdim=True)

        def of(values_BK: Tensor) -> tuple[Tensor, Tensor]:
            return values_BK.gather(1, best_B1)[:, 0], values_BK.gather(1, worst_B1)[:, 0]

        better_B, worse_B = of(logp_BK)
        if self.ranking == "pairwise":
            return pairwise_loss(better_B, worse_B).mean()
        if self.ranking == "dpo":
            assert reference is not None
            start_BK = reference.float().log_softmax(-1).gather(1, guess_BK)
            return dpo_loss(better_B, worse_B, *of(start_BK), beta=self.beta).mean()
        # Feedback is an order: what is told of a guess is its rank.
        rank_BK = reward_BK.argsort(1).argsort(1).float()
        if self.ranking == "rrhf":
            return (rrhf_loss(logp_BK, rank_BK) - better_B).mean()
        imitation = 0.05 * (guess_BK.shape[1] - 1) ** 2
        return (pro_loss(logp_BK, rank_BK) - imitation * better_B).mean()


class ExpectedReward(Term):
    """-E_{y ~ student} r(x, y) + beta KL(student || reference), exactly: all classes are summed over.

    ``reward`` (B, V) is what a reward model says of every class.
    """

    def __init__(
        self, student: Signal, reward: Signal, reference: Signal, *, beta: float = 0.1, name: str = "reward"
    ) -> None:
        super().__init__(name=name, student=student, reward=reward.detach(), reference=reference.detach())
        self.beta = beta

    def compute(self, *, student: Tensor, reward: Tensor, reference: Tensor, **_: Any) -> Tensor:
        log_p_BV, log_q_BV = student.float().log_softmax(-1), reference.float().log_softmax(-1)
        p_BV = log_p_BV.exp()
        self.log("reward", (p_BV * reward).sum(-1).mean())
        return (p_BV * (self.beta * (log_p_BV - log_q_BV) - reward.float())).sum(-1).mean()
