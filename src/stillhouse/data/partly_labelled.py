"""Batches of a few labelled images and of many without labels; images drawn from what is known of the classes.

Shapes: B batch, N images, V classes, P pixels of an image (all channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.core.source import Source
from stillhouse.data.images import Images
from stillhouse.data.mixing import Mixed

UNLABELLED = -100
"""The label of an image whose class is not told; cross-entropy leaves it out."""


class PartlyLabelled(Mixed):
    """Every batch: one of the labelled source, then one of the other, whose labels are taken away.

    ``pixel_values`` (B, C, H, W) and ``labels`` (B,). ``epoch`` is the labelled source's.
    """

    def __init__(self, labelled: Source, unlabelled: Source) -> None:
        super().__init__((labelled, unlabelled))

    def __next__(self) -> dict[str, Tensor]:
        known, other = (next(source) for source in self.sources)
        labels = known["labels"].new_full((len(other["pixel_values"]),), UNLABELLED)
        return {
            "pixel_values": torch.cat([known["pixel_values"], other["pixel_values"]]),
            "labels": torch.cat([known["labels"], labels]),
        }


class ClassGaussians:
    """Images drawn around the mean of a class, with the covariance that images have within their classes.

    The covariance is the pooled one of some images, shrunk towards its diagonal mean; it is never written out, so that
    images may be large: a draw is a random combination of the images' differences from their means.

    Args:
        images: what means and covariance are taken from; every class in it is drawn equally often.
        shrinkage: share of the variance that is spread evenly over the pixels.
    """

    def __init__(self, images: Images, *, shrinkage: float = 0.1) -> None:
        pixels_NP = images[list(range(len(images)))]["pixel_values"].flatten(1)
        self.shape = images.shape
        self.classes = images.labels.unique()
        self.mean_VP = torch.stack([pixels_NP[images.labels == label].mean(0) for label in self.classes])
        place_N = torch.searchsorted(self.classes, images.labels)
        rest_NP = pixels_NP - self.mean_VP[place_N]
        freedom = max(1, len(images) - len(self.classes))
        self.factor_NP = ((1 - shrinkage) / freedom) ** 0.5 * rest_NP
        self.spread = float((shrinkage * rest_NP.square().sum() / freedom / rest_NP.shape[1]) ** 0.5)

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """``pixel_values`` (count, C, H, W) of classes drawn evenly. What class each was meant to be is not told."""
        chosen_B = torch.randint(len(self.classes), (count,), generator=generator)
        mixture_BN = torch.randn(count, len(self.factor_NP), generator=generator)
        noise_BP = torch.randn(count, self.mean_VP.shape[1], generator=generator)
        pixels_BP = self.mean_VP[chosen_B] + mixture_BN @ self.factor_NP + self.spread * noise_BP
        return {"pixel_values": pixels_BP.reshape(count, *self.shape)}
