"""How much of every domain a student reads: weights that follow its gap to the teacher, and the source that obeys them.

Liu et al. (2024), DDK, arXiv 2407.16154, section 3; for comparison Xie et al. (2023), DoReMi, arXiv 2305.10429.
Suffixes: D domains, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.mixing import stacked


def discrepancy_weights(ratio_D: Tensor) -> Tensor:
    """The first factor: exp(ratio) over its sum, of the ratios of the student's perplexities to the teacher's."""
    return ratio_D.double().softmax(-1)


def smoothed_weights(weight_D: Tensor, ratio_D: Tensor, *, alpha: float) -> Tensor:
    """The next factor: alpha psi / sum(psi) + (1 - alpha) / D, with psi = weight * exp(ratio), computed in logs.

    The sum is 1, and no domain falls below (1 - alpha) / D.
    """
    psi_D = (weight_D.double().log() + ratio_D.double()).softmax(-1)
    return alpha * psi_D + (1 - alpha) / len(psi_D)


def excess_weights(weight_D: Tensor, excess_D: Tensor, *, step: float = 1.0, smoothing: float = 1e-3) -> Tensor:
    """DoReMi's next weights: (1 - smoothing) psi / sum(psi) + smoothing / D, with psi = weight * exp(step * excess).

    ``excess_D``: by how much losses exceed a reference's, in nats a token; below 0 counts as 0.
    """
    psi_D = (weight_D.double().log() + step * excess_D.double().clamp(min=0)).softmax(-1)
    return (1 - smoothing) * psi_D + smoothing / len(psi_D)


@dataclass(frozen=True)
class Discrepancy:
    """The rule by which the weights follow the perplexities.

    Args:
        teacher: its perplexities, which do not change.
        alpha: share of the rule; the rest is spread evenly.
        clip: largest ratio that counts; early ones can be huge.
        smooth: off: no memory and no floor, the weights are exp(ratio) over its sum every time.
    """

    teacher: tuple[float, ...]
    alpha: float = 0.5
    clip: float = 10.0
    smooth: bool = True

    def __call__(self, weights: Sequence[float] | None, student: Sequence[float]) -> list[float]:
        """The weights after a look at the student's perplexities; ``weights``: those before, None at the first."""
        ratio_D = torch.tensor(student, dtype=torch.float64) / torch.tensor(self.teacher, dtype=torch.float64)
        ratio_D = ratio_D.clamp(max=self.clip)
        if weights is None or not self.smooth:
            return list(discrepancy_weights(ratio_D).tolist())
        return list(smoothed_weights(torch.tensor(weights), ratio_D, alpha=self.alpha).tolist())


class DomainMixture:
    """Batches whose rows come from several domains, each drawn with the weights that hold in that moment.

    Rows of a domain come in an order shuffled anew for each pass over it, and passes follow each other without end, so
    that a small domain is repeated. ``batch["domain"]`` (B,) says where each row is from.

    Args:
        domains: map-style sets that take a list of indices, as `WindowSplit` does.
        weights: in the beginning.
        every: batches between looks at the student; the first interval is drawn with the weights of the beginning.
        look: gives the student's perplexities, domain by domain; None: the weights stay.
        rule: makes new weights of the old ones and of what was seen; see `Discrepancy`.
    """

    def __init__(
        self,
        domains: Sequence[Any],
        batch_size: int,
        weights: Sequence[float],
        *,
        every: int = 1000,
        look: Callable[[], Sequence[float]] | None = None,
        rule: Callable[[Sequence[float] | None, Sequence[float]], list[float]] | None = None,
        seed: int = 0,
    ) -> None:
        self.domains = list(domains)
        self.batch_size = batch_size
        self.beginning = [weight / sum(weights) for weight in weights]
        self.every, self.look, self.rule, self.seed = every, look, rule, seed
        self.shard = (0, 1)
        self.factor: list[float] | None = None  # the rule's memory
        self.history: list[dict[str, Any]] = []
        self.drawn = [0] * len(self.domains)
        self._turn = 0
        self._orders: dict[int, tuple[int, list[int]]] = {}

    @property
    def epoch(self) -> int:
        """Passes over as much text as all domains hold."""
        return sum(self.drawn) // sum(len(domain) for domain in self.domains)

    @property
    def weights(self) -> list[float]:
        """What the next batch is drawn with."""
        return self.beginning if self.factor is None or self._turn < self.every else self.factor

    def __next__(self) -> dict[str, Tensor]:
        if self.look is not None and self.rule is not None and self._turn % self.every == 0:
            student = list(self.look())
            self.factor = self.rule(self.factor, student)
            self.history.append({"batch": self._turn, "weights": self.weights, "student": student})
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._turn) % 2**63)
        weight_D = torch.tensor(self.weights, dtype=torch.float64)
        domain_B = torch.multinomial(weight_D, self.batch_size, replacement=True, generator=generator)
        self._turn += 1
        rows = [(domain, self._next_row(domain)) for domain in domain_B.tolist()]
        rank, world = self.shard
        own: dict[int, list[int]] = {}
        for domain, row in rows[rank::world]:
            own.setdefault(domain, []).append(row)
        batch = stacked([self.domains[domain][places] for domain, places in own.items()])
        labels = [domain for domain, places in own.items() for _ in places]
        return {**batch, "domain": torch.tensor(labels)}

    def _next_row(self, domain: int) -> int:
        size = len(self.domains[domain])
        epoch, place = divmod(self.drawn[domain], size)
        self.drawn[domain] += 1
        known = self._orders.get(domain)
        if known is None or known[0] != epoch:
            seed = ((self.seed * 1_000_003 + epoch) * 1009 + domain) % 2**63
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
            known = self._orders[domain] = (epoch, order)
        return int(known[1][place])

    def state_dict(self) -> dict[str, Any]:
        return {
            "turn": self._turn,
            "drawn": list(self.drawn),
            "factor": self.factor,
            "history": [dict(line) for line in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._turn, self.drawn = state["turn"], list(state["drawn"])
        self.factor, self.history = state["factor"], [dict(line) for line in state["history"]]
        self._orders = {}
