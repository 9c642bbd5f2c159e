"""Which samples of a training set to keep: scores of samples, and the choice by them.

Every score is (N,), and samples with large scores are kept first; to keep the easy ones of a score of difficulty,
negate it. Suffixes: N samples, V classes, D width of a feature, E looks at the training set, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.base.errors import DataError


def alpha_of_fraction(fraction: float, *, alpha_max: float = 1.0, alpha_min: float = 0.3) -> float:
    """The teacher's weight where a share ``fraction`` of the data is kept: the less data, the more of the teacher.

    A straight line from ``alpha_max`` (nothing kept) to ``alpha_min`` (all kept).
    """
    return alpha_max - (alpha_max - alpha_min) * fraction


# -- scores ---------------------------------------------------------------------------------------------------------


def random_score(count: int, *, seed: int) -> Tensor:
    """A random order: samples kept at one fraction are kept at every larger one."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def el2n_score(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """||softmax(logits) - onehot(label)||, of a network early in training (Paul et al., 2021, arXiv 2107.07075).

    Between 0 and sqrt(2); sqrt(1 - 1/V) where all classes are as likely.
    """
    error_NV = logits_NV.double().softmax(-1) - F.one_hot(labels_N, logits_NV.shape[-1])
    return error_NV.norm(dim=-1)


def forgetting_score(correct_EN: Tensor) -> Tensor:
    """How often each sample went from right to wrong from one look to the next (Toneva et al., 2019, arXiv 1812.05159).

    Args:
        correct_EN: whether the network had each sample right at each look. A sample that was never right counts E.
    """
    correct_EN = correct_EN.bool()
    flips_N = (correct_EN[:-1] & ~correct_EN[1:]).sum(0).double()
    return torch.where(correct_EN.any(0), flips_N, float(len(correct_EN)))


def herding_score(features_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Minus the step in which herding takes a sample: within a class, the next one brings the mean of those taken
    nearest to the mean of the class (Welling, 2009, ICML).
    """
    score_N = torch.zeros(len(labels_N), dtype=torch.float64)
    for label in labels_N.unique():
        at = torch.nonzero(labels_N == label).flatten()
        own_ND = features_ND[at].double()
        own_ND = own_ND / own_ND.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        mean_D, taken_D, left = own_ND.mean(0), own_ND.new_zeros(own_ND.shape[1]), torch.ones(len(at), dtype=torch.bool)
        for step in range(len(at)):
            away_N = ((taken_D + own_ND) / (step + 1) - mean_D).norm(dim=-1)
            best = int(away_N.where(left, torch.inf).argmin())
            score_N[at[best]] = -step
            taken_D, left[best] = taken_D + own_ND[best], False
    return score_N


def moderate_score(features_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Minus how far a sample's distance to its class's mean is from the median one (Xia et al., 2023, ICLR)."""
    score_N = torch.zeros(len(labels_N), dtype=torch.float64)
    for label in labels_N.unique():
        at = labels_N == label
        own_ND = features_ND[at].double()
        distance_N = (own_ND - own_ND.mean(0)).norm(dim=-1)
        score_N[at] = -(distance_N - distance_N.quantile(0.5)).abs()
    return score_N


def prototype_score(features_ND: Tensor, *, clusters: int, seed: int = 0) -> Tensor:
    """Cosine distance to the nearest centre of k-means (Sorscher et al., 2022, arXiv 2206.14486, section 5).

    Meant for features that were learnt without labels: a sample far from all prototypes is hard.
    """
    from sklearn.cluster import KMeans

    unit_ND = F.normalize(features_ND.double(), dim=-1)
    found = KMeans(min(clusters, len(unit_ND)), n_init=4, random_state=seed).fit(unit_ND.numpy())
    centres_KD = F.normalize(torch.from_numpy(found.cluster_centers_), dim=-1)
    return 1 - (unit_ND @ centres_KD.T).amax(-1)


# -- the choice -----------------------------------------------------------------------------------------------------


def kept_positions(score_N: Tensor, labels_N: Tensor, fraction: float, *, balanced: bool) -> Tensor:
    """Positions of the round(fraction N) samples with the largest scores, in ascending order.

    Args:
        balanced: as many of each class, as far as it has them: counts differ by at most 1 among classes that have some
            left. Otherwise classes count for nothing.

    Raises:
        DataError: nothing would be left.
    """
    count = round(fraction * len(score_N))
    if count < 1:
        raise DataError(f"fraction={fraction:g} of {len(score_N)} samples is none; keep more")
    order = score_N.argsort(descending=True, stable=True)
    if not balanced:
        return order[:count].sort().values
    # By place within the class, then by score: first the best of every class, then the second best, and so on.
    place_N = torch.zeros(len(order), dtype=torch.int64)
    for label in labels_N.unique():
        at = torch.nonzero(labels_N[order] == label).flatten()
        place_N[at] = torch.arange(len(at))
    return order[place_N.argsort(stable=True)[:count]].sort().values


def two_views(change: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A change that gives each image twice, changed differently: ``pixel_values``, and those of the view ``second``."""

    def both(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        first, second = change(batch, generator), change(batch, generator)
        return {**first, "second": {"pixel_values": second["pixel_values"]}}  # type: ignore[dict-item]

    return both
