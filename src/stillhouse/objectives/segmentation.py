"""Terms on masks that a promptable segmentation model predicts.

Shapes: B images, K prompts of each, one mask a prompt, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Signal


class MaskLoss(Term):
    """Cross-entropy and dice of mask logits (B, K, 1, H, W) against ``batch[target]`` (B, K, H, W), and the squared
    error of the model's own guess of its IoU (B, K, 1) (Kirillov et al., 2023, arXiv 2304.02643, without focus).
    """

    def __init__(self, masks: Signal, guesses: Signal, *, target: str = "masks", name: str | None = None) -> None:
        super().__init__(name=name, masks=masks, guesses=guesses)
        self.target = target

    def compute(self, *, masks: Tensor, guesses: Tensor, batch: Batch, **_: Any) -> Tensor:
        logits, truth = masks[:, :, 0].flatten(2).float(), batch[self.target].flatten(2).float()
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1)
        hard = (logits > 0).float()
        union = torch.maximum(hard, truth).sum(-1).clamp(min=1)
        iou = (hard * truth).sum(-1) / union
        guess = (guesses[:, :, 0].float() - iou.detach()).square().mean()
        return F.binary_cross_entropy_with_logits(logits, truth) + dice.mean() + guess
