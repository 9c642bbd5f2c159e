"""What PPO needs to know of rollouts when they are written: probabilities, values, advantages.

Shapes: B rollouts, N response tokens of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.responses import Coder, response_tokens
from stillhouse.rl.gae import generalised_advantages, shaped_rewards, whitened
from stillhouse.rl.rollouts import Rollouts, collate_rollouts

Score = Callable[[dict[str, Any]], Tensor]
TOKENS = ("ref_logp", "token_advantages", "returns", "old_values")


@dataclass
class TokenAdvantages:
    """`prepare` and `collate` of a `RolloutSource`: advantages token by token, noted before the policy moves.

    With a critic they are generalised advantages of the reward and a penalty ``kl`` on log(pi / reference); without
    one every token has its response's advantage, as in GRPO. Batches get ``old_logp``, ``ref_logp``,
    ``token_advantages``, and with a critic ``returns`` and ``old_values``: (N).

    Args:
        score, reference: log-probabilities of a batch's response tokens under the policy now, and the initial one.
        value: the critic's values of the states in which they were chosen.
        whiten: bring a round's advantages to mean 0 and variance 1.
    """

    coder: Coder
    score: Score
    reference: Score
    value: Score | None = None
    kl: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    rows: int = 64

    def prepare(self, rollouts: Rollouts) -> None:
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(rollouts), self.rows):
            part = rollouts[start : start + self.rows]
            batch = collate_rollouts(part, self.coder)
            row_N = response_tokens(batch)[2]
            logp_N, ref_N = (score(batch).detach().cpu().float() for score in (self.score, self.reference))
            noted = {"old_logp": logp_N, "ref_logp": ref_N}
            if self.value is None:
                noted["token_advantages"] = batch["advantages"][row_N]
            else:
                noted["old_values"] = value_N = self.value(batch).detach().cpu().float()
                reward_N = shaped_rewards(batch["rewards"], logp_N, ref_N, row_N, kl=self.kl)
                noted["token_advantages"], noted["returns"] = generalised_advantages(
                    reward_N, value_N, row_N, gamma=self.gamma, lam=self.lam
                )
            found.append(noted)
        together = {name: torch.cat([noted[name] for noted in found]) for name in found[0]}
        if self.whiten and self.value is not None:
            together["token_advantages"] = whitened(together["token_advantages"])
        lengths = [len(rollout.ids) for rollout in rollouts]
        for name, values_N in together.items():
            for rollout, values in zip(rollouts, values_N.split(lengths), strict=True):
                if name == "old_logp":
                    rollout.old_logp = values.clone()
                else:
                    rollout.extra[name] = values.clone()

    def collate(self, rollouts: Rollouts) -> dict[str, Any]:
        noted = {
            name: torch.cat([rollout.extra[name] for rollout in rollouts])
            for name in TOKENS
            if name in rollouts[0].extra
        }
        return {**collate_rollouts(rollouts, self.coder), **noted}


def as_noted(batch: dict[str, Any]) -> Tensor:
    """The probabilities that `TokenAdvantages` has noted: the ``score`` of a source whose rollouts have them."""
    return batch["old_logp"]
