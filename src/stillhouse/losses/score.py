"""Score losses: a generator follows the difference of two scores; a critic tracks the generator.

Shapes: B samples of any shape, x_BX (images: X = CHW).
"""

from __future__ import annotations

import torch
from torch import Tensor


def distribution_matching_gradient(x_BX: Tensor, fake_BX: Tensor, real_BX: Tensor, *, normalise: bool = True) -> Tensor:
    """Gradient of KL(p_fake || p_real) in a generated sample, up to a positive factor a sample.

    (mu_fake - mu_real) / mean |x - mu_real| (DMD: Yin et al., 2024, arXiv 2311.18828, eq. 7 and 8), where mu = E[x_0 |
    x_t]
    at the same x_t: the difference of the scores, s_real - s_fake, is alpha / sigma^2 (mu_real - mu_fake).

    Args:
        x_BX: the generated samples.
        fake_BX, real_BX: clean-sample predictions of critic and teacher at the same x_t.
        normalise: divide by the teacher's mean absolute error, so that all levels of noise pull about equally.
    """
    gradient_BX = fake_BX - real_BX
    if normalise:
        scale_B = (x_BX - real_BX).abs().flatten(1).mean(1)
        gradient_BX = gradient_BX / scale_B.reshape(-1, *[1] * (x_BX.ndim - 1))
    return torch.nan_to_num(gradient_BX).detach()


def distribution_matching(x_BX: Tensor, fake_BX: Tensor, real_BX: Tensor, *, normalise: bool = True) -> Tensor:
    """A scalar whose gradient in ``x_BX`` is `distribution_matching_gradient` over the number of elements.

    0.5 mean (x - stopgrad(x - g))^2; no gradient reaches the predictions.
    """
    gradient_BX = distribution_matching_gradient(x_BX.detach(), fake_BX, real_BX, normalise=normalise)
    return 0.5 * (x_BX - (x_BX - gradient_BX).detach()).square().mean()


def denoising(prediction_BX: Tensor, x_0_BX: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error of clean-sample predictions, each sample with its weight: denoising score matching."""
    error_B = (prediction_BX - x_0_BX).square().flatten(1).mean(1)
    return (error_B if weight_B is None else weight_B.reshape(-1) * error_B).mean()
