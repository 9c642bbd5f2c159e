"""How far generated samples are from real ones.

Shapes: N and M samples of any shape, x_NX; D numbers a sample when flattened; K modes; P projections.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def sliced_wasserstein(x_NX: Tensor, y_MX: Tensor, *, projections: int = 64, seed: int = 0) -> float:
    """Sliced Wasserstein-1 distance: the mean over fixed random directions of the distance between projections.

    Counts may differ: the quantile functions are then compared on the coarser grid (Bonneel et al., 2015).
    """
    x_ND, y_MD = x_NX.flatten(1).double(), y_MX.flatten(1).double()
    generator = torch.Generator().manual_seed(seed)
    directions_DP = torch.randn(x_ND.shape[1], projections, generator=generator, dtype=torch.float64)
    directions_DP = (directions_DP / directions_DP.norm(dim=0)).to(x_ND.device)
    x_NP, y_MP = (x_ND @ directions_DP).sort(0).values, (y_MD @ directions_DP).sort(0).values
    if len(x_NP) != len(y_MP):
        q = (torch.arange(min(len(x_NP), len(y_MP)), dtype=torch.float64, device=x_NP.device) + 0.5) / min(
            len(x_NP), len(y_MP)
        )
        x_NP, y_MP = x_NP.quantile(q, 0), y_MP.quantile(q, 0)
    return float((x_NP - y_MP).abs().mean())


def energy_distance(x_NX: Tensor, y_MX: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias; 0 in expectation for equal distributions."""
    x_ND, y_MD = x_NX.flatten(1).double(), y_MX.flatten(1).double()

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x_ND, y_MD).mean() - within(x_ND) - within(y_MD))


@dataclass(frozen=True)
class Modes:
    """``recall``: share of modes found; ``precision``: share of samples on a mode; ``entropy``: evenness, 1 at best."""

    recall: float
    precision: float
    entropy: float


def mode_coverage(x_NX: Tensor, modes_KD: Tensor, *, radius: float, least: float = 0.2) -> Modes:
    """Which modes samples lie on.

    Args:
        radius: a sample farther than this from every mode is on none.
        least: a mode is found if it holds at least this share of its fair part 1 / K of the samples.
    """
    x_ND, count = x_NX.flatten(1), len(modes_KD)
    distance_N, nearest_N = torch.cdist(x_ND, modes_KD.to(x_ND)).min(1)
    near_N = distance_N <= radius
    share_K = torch.bincount(nearest_N[near_N], minlength=count).double() / len(x_ND)
    on_mode = float(share_K.sum())
    p_K = share_K / max(on_mode, 1e-12)
    entropy = float(-(p_K * p_K.clamp(min=1e-12).log()).sum()) / math.log(count)
    return Modes(float((share_K >= least / count).double().mean()), on_mode, entropy)


def frechet_distance(x_ND: Tensor, y_MD: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two sets of features (Heusel et al., 2017, arXiv 1706.08500)."""
    x_ND, y_MD = x_ND.flatten(1).double(), y_MD.flatten(1).double()
    a_DD, b_DD = x_ND.T.cov(), y_MD.T.cov()
    values_D, vectors_DD = torch.linalg.eigh(a_DD)
    root_DD = vectors_DD @ torch.diag(values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    cross = torch.linalg.eigvalsh(root_DD @ b_DD @ root_DD).clamp(min=0).sqrt().sum()
    mean = (x_ND.mean(0) - y_MD.mean(0)).square().sum()
    return float((mean + a_DD.trace() + b_DD.trace() - 2 * cross).clamp(min=0))


@torch.no_grad()
def random_features(x_BCHW: Tensor, *, width: int = 32, seed: int = 0) -> Tensor:
    """Features (B, 2 width) of a fixed random convolutional network: mean and standard deviation of its last maps.

    They tell shapes and textures apart well enough for a Fréchet distance between sets of small images, with nothing to
    download; the figure cannot be compared with FID.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, size = x_BCHW, (x_BCHW.shape[1], width // 2, width)
    for inner, outer in itertools.pairwise(size):
        weight = torch.randn(outer, inner, 3, 3, generator=generator) / math.sqrt(9 * inner)
        hidden = nn.functional.leaky_relu(nn.functional.conv2d(hidden, weight.to(hidden), padding=1), 0.2)
        hidden = nn.functional.avg_pool2d(hidden, 2) if min(hidden.shape[2:]) >= 4 else hidden
    return torch.cat([hidden.mean((2, 3)), hidden.std((2, 3))], 1)
