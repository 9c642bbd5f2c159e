"""Calibration: does a model's confidence say how often it is right?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Reliability:
    """Confidence against accuracy in equal bins, added up batch by batch (Guo et al., 2017, arXiv 1706.04599)."""

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._sums = torch.zeros(3, bins, dtype=torch.float64)  # confidence, hits, count

    def add(self, confidence_N: Tensor, correct_N: Tensor) -> None:
        """Take in the probability of the top prediction and whether it was right, both (N,)."""
        confidence_N = confidence_N.detach().double().cpu().flatten()
        place_N = (confidence_N * self.bins).long().clamp_(0, self.bins - 1)
        rows = torch.stack([confidence_N, correct_N.detach().double().cpu().flatten(), torch.ones_like(confidence_N)])
        self._sums.index_add_(1, place_N, rows)

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by count."""
        confidence, hits, count = self._sums
        total = count.sum().item()
        return float((confidence - hits).abs().sum() / total) if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Bins that hold something, with their mean confidence and accuracy."""
        bins = [
            {"confidence": confidence / count, "accuracy": hits / count, "count": int(count)}
            for confidence, hits, count in self._sums.T.tolist()
            if count
        ]
        return {"bins": bins, "ece": self.ece}
