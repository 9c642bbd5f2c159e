"""ZCA whitening of images: a linear map after which pixels are uncorrelated, as near to the images as can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ZCA:
    """x -> W (x - mean), for images (B, C, H, W) flattened to D."""

    mean_D: Tensor  # noqa: N815
    whiten_DD: Tensor  # noqa: N815

    @staticmethod
    def fit(images: Tensor, *, eps: float = 0.1) -> ZCA:
        """From images (N, C, H, W): W = U (S + eps)^(-1/2) U' of their covariance U S U'."""
        flat_ND = images.flatten(1).double()
        mean_D = flat_ND.mean(0)
        centred_ND = flat_ND - mean_D
        values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(images))
        whiten_DD = vectors_DD * (values_D.clamp(min=0) + eps).rsqrt() @ vectors_DD.T
        return ZCA(mean_D, whiten_DD)

    def __call__(self, images: Tensor) -> Tensor:
        """The whitened images, in their own shape and precision."""
        flat_ND = images.flatten(1).double() - self.mean_D
        return (flat_ND @ self.whiten_DD.T).reshape(images.shape).to(images.dtype)
