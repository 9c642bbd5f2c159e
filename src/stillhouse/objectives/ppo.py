"""Terms of PPO: the actor's clipped policy loss and the critic's value loss, on rollouts with token advantages.

Shapes: B rows, T tokens, N response tokens of the batch. Batches are those of `stillhouse.rl.ppo.TokenAdvantages`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Signal
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.data.responses import response_tokens
from stillhouse.losses.policy_gradient import (
    Estimator,
    Normalisation,
    average_tokens,
    clipped_surrogate,
    kl_to_reference,
)
from stillhouse.losses.token_logprobs import token_logprobs
from stillhouse.losses.value import clipped_value_loss
from stillhouse.objectives.language import LanguageHead
from stillhouse.objectives.responses import log_rollouts, opened


class ClippedPolicy(Term):
    """-min(rho A, clip(rho) A) with an advantage for every token, and perhaps a penalty towards the initial policy.

    Logs what tells an unstable run: reward, length, ``kl`` to the initial policy, ``staleness`` (KL of the policy that
    wrote the batch to the one that learns), the share of tokens that are ``clipped``, and the ``round`` of rollouts.
    All KLs are means per token, estimated on the batch (k3).

    Args:
        student: output head of the actor.
        kl: weight of the penalty in the loss; 0 where it is part of the rewards.
    """

    def __init__(
        self,
        student: LanguageHead,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalisation: Normalisation = "token",
        kl: Scheduled = 0.0,
        estimator: Estimator = "k3",
        temperature: float = 1.0,
        name: str = "Policy",
    ) -> None:
        super().__init__(name=name, **student.signals("student"))
        self.head = student
        self.clip = {"clip_low": clip_low, "clip_high": clip_high}
        self.normalisation: Normalisation = normalisation
        self.kl = kl
        self.estimator: Estimator = estimator
        self.temperature = temperature

    def compute(self, *, batch: Batch, progress: Progress, **tensors: Tensor) -> list[TermValue]:
        at_BT, label_N, row_N = response_tokens(batch)
        rows = len(batch["input_ids"])
        hidden_BTD, head = opened(self.head, "student", tensors)
        logp_N = token_logprobs(hidden_BTD[at_BT], head, label_N, temperature=self.temperature)
        loss_N = clipped_surrogate(logp_N, batch["old_logp"], batch["token_advantages"], **self.clip)
        values = [TermValue(self.name, average_tokens(loss_N, row_N, rows, how=self.normalisation))]
        if self.kl != 0:
            kl_N = kl_to_reference(logp_N, batch["ref_logp"], estimator=self.estimator)
            penalty = average_tokens(kl_N, row_N, rows, how=self.normalisation)
            values.append(TermValue("KL", penalty, self.at(self.kl, progress)))
        with torch.no_grad():
            log_rollouts(self, batch)
            if "round" in batch:
                self.log("round", float(batch["round"]))
            rho_N = torch.exp(logp_N - batch["old_logp"])
            self.log("kl", kl_to_reference(logp_N, batch["ref_logp"]).mean())
            self.log("staleness", kl_to_reference(batch["old_logp"], logp_N).mean())
            outside_N = (rho_N < 1 - self.clip["clip_low"]) | (rho_N > 1 + self.clip["clip_high"])
            self.log("clipped", outside_N.float().mean())
        return values


class ValueMatch(Term):
    """The clipped value loss of a critic; logs the share of the returns' variance that it ``explained``."""

    def __init__(self, value: Signal, *, clip: float | None = 0.2, name: str = "Value") -> None:
        super().__init__(name=name, value=value)
        self.clip = clip

    def compute(self, *, value: Tensor, batch: Batch, **_: Any) -> Tensor:
        value_N = value[:, :-1][response_tokens(batch)[0]]
        loss_N = clipped_value_loss(value_N, batch["old_values"], batch["returns"], clip=self.clip)
        left = (batch["returns"] - value_N.detach()).var(correction=0)
        self.log("explained", 1 - left / batch["returns"].var(correction=0).clamp(min=1e-8))
        return loss_N.mean()
