"""Terms on responses: preferences between them, policy gradients, and routed self-distillation.

Shapes: B rows (prompt and response), P pairs, T tokens, N response tokens of the batch, S of them distilled, D hidden
width, V vocabulary. Batches are those of `stillhouse.data.responses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Turn, as_batch
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.data.responses import response_tokens
from stillhouse.losses.bucketed import certainty_weights, entropy, topk_bucket_jsd
from stillhouse.losses.policy_gradient import (
    Estimator,
    Normalisation,
    average_tokens,
    clipped_surrogate,
    kl_to_reference,
    truncated_ratio,
)
from stillhouse.losses.preference import dpo_loss, sums_by_row
from stillhouse.losses.token_logprobs import Head, in_chunks, token_logprobs
from stillhouse.objectives.language import LanguageHead


def opened(head: LanguageHead, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Head]:
    """(hidden states without the last position, the head as tensors)."""
    weight, bias = tensors[f"{prefix}_weight"], tensors.get(f"{prefix}_bias")
    return tensors[f"{prefix}_hidden"][:, :-1], Head(weight, bias, head.scale, head.softcap)


def response_logprobs(head: LanguageHead, batch: Mapping[str, Any], *, temperature: float = 1.0) -> Tensor:
    """log p of every response token of a batch, by one forward: (N)."""
    signals = head.signals("model")
    turn = Turn(signals.values())
    batch = as_batch(batch)
    hidden_BTD, layer = opened(head, "model", {name: turn.read(signal, batch) for name, signal in signals.items()})
    at_BT, label_N, _ = response_tokens(batch)
    return token_logprobs(hidden_BTD[at_BT], layer, label_N, temperature=temperature)


@dataclass(frozen=True)
class Pairs:
    """What a loss on pairs gets, each (P): log-probabilities summed and numbers of tokens, better (w) and worse (l)."""

    logp_w: Tensor
    length_w: Tensor
    logp_l: Tensor
    length_l: Tensor
    ref_w: Tensor | None = None
    ref_l: Tensor | None = None


class PairLoss(Term):
    """A loss on pairs of responses to the same prompt: the first half of a batch's rows is the better one.

    Logs the mean log-probability per token of both (``chosen_logp``, ``rejected_logp``): that both fall is the sign of
    a collapse.

    Args:
        student: output head of the policy.
        loss: ``Pairs -> (P)``.
        reference: output head of a frozen reference model, for losses that read ``ref_w`` and ``ref_l``.
    """

    def __init__(
        self,
        student: LanguageHead,
        loss: Callable[[Pairs], Tensor],
        *,
        reference: LanguageHead | None = None,
        name: str | None = None,
    ) -> None:
        signals = student.signals("student") | (reference.signals("reference", detach=True) if reference else {})
        super().__init__(name=name, **signals)
        self.heads = (student, reference)
        self.loss = loss

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> Tensor:
        at_BT, label_N, row_N = response_tokens(batch)
        rows = len(batch["input_ids"])

        def sums(head: LanguageHead, prefix: str) -> tuple[Tensor, ...]:
            hidden_BTD, layer = opened(head, prefix, tensors)
            logp_N = token_logprobs(hidden_BTD[at_BT], layer, label_N)
            return sums_by_row(logp_N, row_N, rows).chunk(2)

        student, reference = self.heads
        w_P, l_P = sums(student, "student")
        length_w_P, length_l_P = torch.bincount(row_N, minlength=rows).chunk(2)
        self.log("chosen_logp", w_P.sum() / length_w_P.sum())
        self.log("rejected_logp", l_P.sum() / length_l_P.sum())
        known = () if reference is None else sums(reference, "reference")
        return self.loss(Pairs(w_P, length_w_P, l_P, length_l_P, *known)).mean()


def preferring(student: LanguageHead, reference: LanguageHead, *, beta: float, name: str) -> PairLoss:
    """Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290) against a frozen reference.

    With the data's responses as the better ones, and as the worse ones those of the reference itself, it is the loss of
    self-play fine-tuning (Chen et al., 2024, arXiv 2401.01335, eq. 4.7).
    """

    def loss(pairs: Pairs) -> Tensor:
        assert pairs.ref_w is not None and pairs.ref_l is not None
        return dpo_loss(pairs.logp_w, pairs.logp_l, pairs.ref_w, pairs.ref_l, beta=beta)

    return PairLoss(student, loss, reference=reference, name=name)


class PolicyGradient(Term):
    """The clipped group-relative loss on rollouts, with an optional penalty towards a reference (GRPO and its kin).

    Reads ``advantages`` (B) and, if rollouts are used more than once, ``old_logp`` (N); without it a batch counts as
    written by the policy as it is, and the ratio is 1.
    """

    def __init__(
        self,
        student: LanguageHead,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalisation: Normalisation = "sequence",
        constant: float | None = None,
        kl: Scheduled = 0.0,
        estimator: Estimator = "k3",
        reference: LanguageHead | None = None,
        temperature: float = 1.0,
        name: str = "PolicyGradient",
    ) -> None:
        signals = student.signals("student") | (reference.signals("reference", detach=True) if reference else {})
        super().__init__(name=name, **signals)
        self.heads = (student, reference)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.normalisation: Normalisation = normalisation
        self.constant = constant
        self.kl = kl
        self.estimator: Estimator = estimator
        self.temperature = temperature

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> list[TermValue]:
        at_BT, label_N, row_N = response_tokens(batch)
        student, reference = self.heads
        hidden_BTD, head = opened(student, "student", tensors)
        logp_N = token_logprobs(hidden_BTD[at_BT], head, label_N, temperature=self.temperature)
        loss_N = clipped_surrogate(
            logp_N, batch.get("old_logp", logp_N.detach()), batch["advantages"][row_N], **self.clip
        )
        values = [TermValue(self.name, self._average(loss_N, row_N, batch))]
        log_rollouts(self, batch)
        if reference is not None:
            hidden_BTD, head = opened(reference, "reference", tensors)
            ref_logp_N = token_logprobs(hidden_BTD[at_BT], head, label_N, temperature=self.temperature)
            kl_N = kl_to_reference(logp_N, ref_logp_N, estimator=self.estimator)
            values.append(TermValue("KL", self._average(kl_N, row_N, batch), self.at(self.kl, progress)))
        return values

    def _average(self, loss_N: Tensor, row_N: Tensor, batch: Batch) -> Tensor:
        rows = len(batch["input_ids"])
        return average_tokens(loss_N, row_N, rows, how=self.normalisation, constant=self.constant)


def log_rollouts(term: Term, batch: Batch) -> None:
    """Log how good, how long and how complete a batch of rollouts is."""
    term.log("reward", batch["rewards"].mean())
    term.log("tokens", batch["loss_mask"].sum() / len(batch["loss_mask"]))
    term.log("finished", batch["finished"].mean())


class RoutedDistillation(Term):
    """Group-relative and self-distillation losses, each response sent to one of them or weighed between them (SRPO).

    L = [sum z^G l^G + sum z^S w l^S] / number of tokens that have a weight (Li et al., 2026, arXiv 2604.02288): l^G the
    clipped surrogate; l^S the Jensen-Shannon divergence to the self-teacher's distribution, over the student's
    ``top_k`` tokens and a bucket; w certainty weights of mean 1 over the batch's distilled tokens. Where the policy has
    moved since it wrote them, distilled tokens are weighed by their ratio, cut at ``ratio_limit``.

    Args:
        student: output head of the policy.
        teacher: output head of the self-teacher in the view ``hinted``: the batch's ``hinted`` holds the rows with
            z^S > 0, in the order of the batch, the same responses after another prompt.
        beta: how strongly uncertain targets fade; None weighs all alike.

    The batch holds ``z_group`` and ``z_distil`` (B) besides what `PolicyGradient` reads.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        top_k: int = 100,
        beta: float | None = 1.0,
        ratio_limit: float = 2.0,
        temperature: float = 1.0,
        name: str = "GroupRelative",
    ) -> None:
        super().__init__(name=name, **student.signals("student"), **teacher.signals("teacher", detach=True))
        self.heads = (student, teacher)
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.top_k = top_k
        self.beta = beta
        self.ratio_limit = ratio_limit
        self.temperature = temperature

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> list[TermValue]:
        at_BT, label_N, row_N = response_tokens(batch)
        student, teacher = self.heads
        hidden_BTD, head = opened(student, "student", tensors)
        hidden_ND = hidden_BTD[at_BT]
        logp_N = token_logprobs(hidden_ND, head, label_N, temperature=self.temperature)
        old_logp_N = batch.get("old_logp", logp_N.detach())
        surrogate_N = clipped_surrogate(logp_N, old_logp_N, batch["advantages"][row_N], **self.clip)
        z_group_N, z_distil_N = batch["z_group"][row_N], batch["z_distil"][row_N]
        distilled_N = z_distil_N > 0
        tokens = ((z_group_N > 0) | distilled_N).sum().clamp(min=1)

        hinted_BTD, teacher_head = opened(teacher, "teacher", tensors)
        target_SD = hinted_BTD[response_tokens(batch["hinted"])[0]]
        divergence_S, entropy_S = self._divergence(hidden_ND[distilled_N], target_SD, head, teacher_head)
        weight_S = torch.ones_like(entropy_S) if self.beta is None else certainty_weights(entropy_S, beta=self.beta)
        ratio_S = truncated_ratio(logp_N[distilled_N], old_logp_N[distilled_N], limit=self.ratio_limit)
        log_rollouts(self, batch)
        self.log("distilled", (batch["z_distil"] > 0).float().mean())
        if len(entropy_S):
            self.log("teacher_entropy", entropy_S.mean())
        if "corrupted" in batch and len(weight_S):
            marked_S = batch["corrupted"][row_N][distilled_N] > 0
            for label, chosen_S in (("weight_corrupted", marked_S), ("weight_clean", ~marked_S)):
                if chosen_S.any():
                    self.log(label, weight_S[chosen_S].mean())
        return [
            TermValue(self.name, (z_group_N * surrogate_N).sum() / tokens),
            TermValue("SelfDistillation", (z_distil_N[distilled_N] * ratio_S * weight_S * divergence_S).sum() / tokens),
        ]

    def _divergence(self, hidden_SD: Tensor, target_SD: Tensor, student: Head, teacher: Head) -> tuple[Tensor, Tensor]:
        """(divergence, entropy of the target) of each distilled token."""

        def chunk(hidden_CD: Tensor, target_CD: Tensor) -> Tensor:
            student_CV = student.logits(hidden_CD) / self.temperature
            teacher_CV = teacher.logits(target_CD) / self.temperature
            return torch.stack([topk_bucket_jsd(student_CV, teacher_CV, k=self.top_k), entropy(teacher_CV)], -1)

        both_S2 = in_chunks(chunk, hidden_SD, target_SD, vocab_size=len(student.weight))
        return both_S2[:, 0], both_S2[:, 1].detach()
