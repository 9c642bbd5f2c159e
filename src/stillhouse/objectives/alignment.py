"""Terms that align a policy with what two preference-tuned models say (AlignDistil, Zhang et al., 2025).

Shapes: B rows, T tokens, N response tokens of the batch, D hidden width, V vocabulary. Batches are those of
`stillhouse.data.responses`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import response_tokens
from stillhouse.losses.divergences import ReverseKL
from stillhouse.losses.extrapolation import Extrapolation, linear_extrapolated_kl
from stillhouse.losses.linear_divergence import OutputLayer
from stillhouse.losses.preference import sums_by_row
from stillhouse.losses.token_logprobs import Head, head_divergence, token_logprobs
from stillhouse.objectives.language import LanguageHead
from stillhouse.objectives.responses import opened


def layer_of(head: Head) -> OutputLayer:
    """The same output layer as the fused losses take it."""
    return OutputLayer(head.weight, head.bias, head.scale, head.softcap, len(head.weight))


def per_response(row_N: Tensor, rows: int) -> Tensor:
    """1 / (B |y|): weights that give the batch's mean over responses of their mean over tokens (N)."""
    length_B = torch.bincount(row_N, minlength=rows)
    return 1 / (rows * length_B[row_N].float())


class ExtrapolatedTeacher(Term):
    """(1/|y|) sum_t beta_t KL(policy || pi*_t), pi* between or beyond two frozen models (arXiv 2503.02832).

    Logs the mean ``alpha`` and total variation ``tvd`` of the two, and the mean length ``tokens``: a policy that is
    pulled too far shows in them first.

    Args:
        student, plus, minus: output heads of the policy, of the model to follow and of the one to leave.
        how: see `Extrapolation`.
        shifted: weigh the places that predict a response's tokens; off: the places of these tokens, each of which
            predicts the next one, as the authors' off-policy code does: the first prediction is left out, and what
            would follow the last token counts.
    """

    def __init__(
        self,
        student: LanguageHead,
        plus: LanguageHead,
        minus: LanguageHead,
        how: Extrapolation,
        *,
        shifted: bool = True,
        chunk_tokens: int | None = None,
        name: str = "AlignDistil",
    ) -> None:
        frozen = plus.signals("plus", detach=True) | minus.signals("minus", detach=True)
        super().__init__(name=name, **student.signals("student"), **frozen)
        self.heads = (student, plus, minus)
        self.how = how
        self.shifted = shifted
        self.chunk_tokens = chunk_tokens

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> Tensor:
        rows = len(batch["input_ids"])
        at_BT = batch["loss_mask"].bool()  # unshifted, of all places: no row may depend on how long another is
        if self.shifted:
            at_BT = F.pad(response_tokens(batch)[0], (0, 1))
        row_N = at_BT.nonzero()[:, 0]
        parts = []
        for head, prefix in zip(self.heads, ("student", "plus", "minus"), strict=True):
            _, layer = opened(head, prefix, tensors)
            parts.append((tensors[f"{prefix}_hidden"][at_BT], layer_of(layer)))
        weight_N = per_response(row_N, rows)
        student, plus, minus = parts
        result = linear_extrapolated_kl(
            *student,
            *plus,
            *minus,
            how=self.how,
            weight_N=weight_N,
            chunk_tokens=self.chunk_tokens,
        )
        count = max(1, len(row_N))
        self.log("alpha", result.alpha.sum() / count)
        self.log("tvd", result.tvd.sum() / count)
        self.log("tokens", batch["loss_mask"].sum() / rows)
        return result.loss


class SequenceReward(Term):
    """The same two models as one reward a response, R = beta0 log pi_plus(y) / pi_minus(y): the ablation.

    Minimises (1/|y|) [-(R - mean R) log pi(y) + beta KL(pi || pi_origin)]: the likelihood-ratio gradient of RLHF with
    that reward and the reference that ``how.origin`` names, as for single tokens: pi_plus if pi_minus is a reverse
    model, pi_minus if that is the reference. ``how`` must have a fixed alpha, beta = beta0 / alpha. Responses must be
    the policy's own.
    """

    def __init__(
        self,
        student: LanguageHead,
        plus: LanguageHead,
        minus: LanguageHead,
        how: Extrapolation,
        *,
        name: str = "SequenceReward",
    ) -> None:
        frozen = plus.signals("plus", detach=True) | minus.signals("minus", detach=True)
        super().__init__(name=name, **student.signals("student"), **frozen)
        if how.fixed is None:
            raise ValueError("a reward for whole responses needs a fixed alpha")
        self.heads = (student, plus, minus)
        self.how = how
        self.strength = how.beta0 / how.fixed if how.strength is None else how.strength

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> list[TermValue]:
        at_BT, label_N, row_N = response_tokens(batch)
        rows = len(batch["input_ids"])
        found = [
            opened(head, prefix, tensors) for head, prefix in zip(self.heads, ("student", "plus", "minus"), strict=True)
        ]
        hidden = [hidden_BTD[at_BT] for hidden_BTD, _ in found]
        logp_N, plus_N, minus_N = (
            token_logprobs(one_ND, layer, label_N) for one_ND, (_, layer) in zip(hidden, found, strict=True)
        )
        reward_B = self.how.beta0 * sums_by_row(plus_N - minus_N, row_N, rows).detach()
        weight_N = per_response(row_N, rows)
        gradient = -((reward_B - reward_B.mean())[row_N] * logp_N * weight_N).sum()
        origin = 1 if self.how.origin == "plus" else 2
        options = {"divergence": ReverseKL(), "weight_N": weight_N, "reduction": "sum"}
        kl = head_divergence(hidden[0], found[0][1], hidden[origin], found[origin][1], **options).loss
        self.log("reward", reward_B.mean())
        self.log("tokens", batch["loss_mask"].sum() / rows)
        return [TermValue(self.name, gradient), TermValue("KL", kl, self.strength)]
