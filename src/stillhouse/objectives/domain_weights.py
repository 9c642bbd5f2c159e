"""DoReMi's proxy: a model that is trained on the domains in which it is furthest behind a reference, and their weights.

Shapes: B sequences, T predictions of each, N predictions that count, D domains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch
from stillhouse.data.domain_mixture import excess_weights
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.objectives.language import LanguageHead, predicted


class ExcessWeightedLoss(Term):
    """Next-token cross-entropy of each domain, times weights that grow with the excess over a reference's.

    At every step the excess of a domain is the mean over its tokens of max(0, loss - reference's loss), and
    w <- (1 - c) w exp(step excess) / sum + c / D; a domain without tokens in a batch keeps its last excess. The loss is
    sum_d w_d (mean loss of d). (Group DRO in DoReMi, Xie et al., 2023, arXiv 2305.10429, algorithm 1.)

    Batches hold ``domain`` (B): the domain of every row, drawn evenly.

    Args:
        student, reference: output heads.
        domains: D.
        step, smoothing: the step size and c of the rule.
    """

    weight: Tensor
    excess: Tensor
    total: Tensor
    steps: Tensor

    def __init__(
        self,
        student: LanguageHead,
        reference: LanguageHead,
        *,
        domains: int,
        step: float = 1.0,
        smoothing: float = 1e-3,
        vocab_size: int,
        name: str = "DoReMi",
    ) -> None:
        super().__init__(name=name, **student.signals("student"), **reference.signals("reference", detach=True))
        self.heads = {"student": student, "reference": reference}
        self.step, self.smoothing, self.vocab_size = step, smoothing, vocab_size
        self.register_buffer("weight", torch.full((domains,), 1 / domains, dtype=torch.float64))
        self.register_buffer("excess", torch.zeros(domains, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(domains, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    @property
    def mean_weights(self) -> list[float]:
        """The mean of the weights over all steps: what DoReMi hands on."""
        return (self.total / self.steps.clamp(min=1)).tolist()

    def compute(self, *, batch: Batch, **tensors: Any) -> Tensor:
        labels_BT, weight_BT = predicted(batch)
        keep_BT = weight_BT.bool()
        nats_N, theirs_N = (self._nats(side, tensors, labels_BT, keep_BT) for side in ("student", "reference"))
        domain_N = batch["domain"].to(labels_BT.device)[:, None].expand_as(labels_BT)[keep_BT]
        count_D, behind_D = (
            torch.zeros_like(self.weight).index_add(0, domain_N, values_N.double())
            for values_N in (torch.ones_like(nats_N), (nats_N.detach() - theirs_N).clamp(min=0))
        )
        if torch.is_grad_enabled():
            self._move(count_D.clone(), behind_D)
        share_N = (self.weight / count_D.clamp(min=1)).to(nats_N.dtype)[domain_N]
        return (share_N * nats_N).sum()

    def _nats(self, side: str, tensors: dict[str, Any], labels_BT: Tensor, keep_BT: Tensor) -> Tensor:
        head, bias = self.heads[side], tensors.get(f"{side}_bias")
        opened = Head(
            tensors[f"{side}_weight"][: self.vocab_size],
            None if bias is None else bias[: self.vocab_size],
            head.scale,
            head.softcap,
        )
        with torch.set_grad_enabled(side == "student" and torch.is_grad_enabled()):
            return -token_logprobs(tensors[f"{side}_hidden"][:, :-1][keep_BT], opened, labels_BT[keep_BT])

    def _move(self, count_D: Tensor, behind_D: Tensor) -> None:
        """Bring the weights up to this batch, that of all processes together."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count_D)
            torch.distributed.all_reduce(behind_D)
        self.excess.copy_(torch.where(count_D > 0, behind_D / count_D.clamp(min=1), self.excess))
        self.weight.copy_(excess_weights(self.weight, self.excess, step=self.step, smoothing=self.smoothing))
        self.total.add_(self.weight)
        self.steps.add_(1)
