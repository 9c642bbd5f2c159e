"""How well masks agree."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_iou(predicted_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Intersection over union of N pairs of boolean masks, (N,); two empty masks agree perfectly.

    Raises ``ValueError`` if the shapes differ.
    """
    if predicted_NHW.shape != target_NHW.shape:
        raise ValueError(f"masks of shapes {tuple(predicted_NHW.shape)} and {tuple(target_NHW.shape)} do not compare")
    p, t = predicted_NHW.bool().flatten(1), target_NHW.bool().flatten(1)
    union_N = (p | t).sum(1)
    return torch.where(union_N > 0, (p & t).sum(1) / union_N.clamp(min=1), torch.ones(()).to(union_N.device))


class MeanIoU:
    """Mean IoU over all masks, added up batch by batch."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def add(self, predicted_NHW: Tensor, target_NHW: Tensor) -> None:
        iou_N = mask_iou(predicted_NHW, target_NHW)
        self._sum += float(iou_N.double().sum())
        self.count += len(iou_N)

    @property
    def value(self) -> float:
        return self._sum / max(1, self.count)
