"""Objectives of models that are trained together and read each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stillhouse.core.objective import Objective, Sum, Weighted
from stillhouse.core.observed import Signal
from stillhouse.core.schedule import Progress, Scheduled
from stillhouse.losses.balanced import entropy_gap
from stillhouse.losses.divergences import RowDivergence
from stillhouse.objectives.logits import CrossEntropy, LogitMatch


class PeerMatch(LogitMatch):
    """`LogitMatch` to a peer that is learning too: it takes no gradient, and the mean gap of entropies is logged."""

    def compute(self, *, student: Tensor, teacher: Tensor, progress: Progress, **inputs: Any) -> Tensor:
        self.log("entropy_gap", entropy_gap(student, teacher).mean())
        return super().compute(student=student, teacher=teacher, progress=progress, **inputs)


def with_peers(
    own: Signal, peers: Sequence[Signal], divergence: RowDivergence, *, weight: Scheduled = 1.0, name: str = "peers"
) -> Objective:
    """Cross-entropy to the labels plus ``weight`` times the mean divergence to the logits of the peers.

    With every network in ``peers`` of every other one this is mutual learning (Zhang et al., 2018, arXiv 1706.00384).
    """
    terms: list[Objective] = [PeerMatch(own, peer, divergence, name=name) for peer in peers]
    mean = [Weighted(term, 1 / len(peers)) if len(peers) > 1 else term for term in terms]
    return Sum([CrossEntropy(own), Weighted(Sum(mean) if len(mean) > 1 else mean[0], weight)])
