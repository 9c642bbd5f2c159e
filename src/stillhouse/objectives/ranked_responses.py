"""Terms on ranked responses: of a policy, to lists of any length, and of a model that scores them.

Shapes: B rows, T tokens, N response tokens, P pairs, K responses in a list. Batches are those of
`stillhouse.data.elicited`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal
from stillhouse.data.responses import response_tokens
from stillhouse.losses.preference import pairwise_loss, pro_loss, rrhf_loss, sums_by_row
from stillhouse.losses.token_logprobs import token_logprobs
from stillhouse.objectives.language import LanguageHead
from stillhouse.objectives.responses import PairLoss, opened


def preferring_by_mean(student: LanguageHead, *, name: str = "pairwise") -> PairLoss:
    """Bradley-Terry on pairs; a response's score is its log-probability per token, and there is no reference."""
    return PairLoss(
        student,
        lambda p: pairwise_loss(p.logp_w / p.length_w.clamp(min=1), p.logp_l / p.length_l.clamp(min=1)),
        name=name,
    )


class RankedResponses(Term):
    """RRHF (Yuan et al., 2023, arXiv 2304.05302) or PRO (Song et al., 2023, arXiv 2306.17492) on lists of responses.

    A response's score is its log-probability per token; what is told of it is its rank. Beside the ranking stands the
    cross-entropy of the best response, per token, as in the papers: with weight 1 (RRHF, eq. 5) or 0.05 (K - 1)^2 (PRO,
    section 4). The mean is over lists. Logs how many of a list's pairs are ``ordered`` right.

    Args:
        student: output head of the policy.

    The batch holds ``list`` (B), the number of the list that a row is in, counted from 0, and ``rank`` (B).
    """

    def __init__(
        self, student: LanguageHead, ranking: Literal["rrhf", "pro"] = "rrhf", *, name: str = "ranking"
    ) -> None:
        super().__init__(name=name, **student.signals("student"))
        self.head = student
        self.ranking = ranking

    def compute(self, *, batch: Batch, progress: Any, **tensors: Tensor) -> Tensor:
        at_BT, label_N, row_N = response_tokens(batch)
        rows = len(batch["input_ids"])
        hidden_BTD, head = opened(self.head, "student", tensors)
        logp_N = token_logprobs(hidden_BTD[at_BT], head, label_N)
        mean_B = sums_by_row(logp_N, row_N, rows) / torch.bincount(row_N, minlength=rows).clamp(min=1)
        losses, right, pairs = [], mean_B.new_zeros(()), 0
        for number in range(int(batch["list"].max()) + 1):
            inside_B = batch["list"] == number
            mean_1K, rank_1K = mean_B[inside_B][None], batch["rank"][inside_B][None]
            loss_1 = rrhf_loss(mean_1K, rank_1K) if self.ranking == "rrhf" else pro_loss(mean_1K, rank_1K)
            K = mean_1K.shape[1]
            imitation = 1.0 if self.ranking == "rrhf" else 0.05 * (K - 1) ** 2
            losses.append(loss_1[0] - imitation * mean_1K[0, rank_1K[0].argmax()])
            above_KK = rank_1K[0][:, None] > rank_1K[0][None]
            right = right + ((mean_1K[0][:, None] > mean_1K[0][None]) & above_KK).sum()
            pairs += int(above_KK.sum())
        self.log("ordered", right / max(1, pairs))
        return torch.stack(losses).mean()


class RewardOrder(Term):
    """What reward models learn: -log sigmoid(r(x, y_w) - r(x, y_l)) (Ouyang et al., 2022, arXiv 2203.02155, eq. 1).

    ``score`` (B, 1): the first half of a batch's rows is the better one of each pair. Equal rewards cost ln 2. Logs how
    many pairs are ``ordered`` right.
    """

    def __init__(self, score: Signal, *, name: str = "reward") -> None:
        super().__init__(name=name, score=score)

    def compute(self, *, score: Tensor, **_: Any) -> Tensor:
        better_P, worse_P = score.float().squeeze(-1).chunk(2)
        self.log("ordered", (better_P > worse_P).float().mean())
        return pairwise_loss(better_P, worse_P).mean()
