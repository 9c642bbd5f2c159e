"""Linear probes: what a linear classifier reads from frozen features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def linear_probe(
    features_ND: Tensor, labels_N: Tensor, test_features_MD: Tensor, test_labels_M: Tensor, *, strength: float = 1.0
) -> float:
    """Accuracy of logistic regression on standardised features; ``strength`` is the inverse of its L2 penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = features_ND.mean(0), features_ND.std(0, correction=0).clamp(min=1e-6)
    train, test = (((x - mean) / std).double().numpy() for x in (features_ND, test_features_MD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(C=strength, max_iter=500).fit(train, labels_N.numpy())
    return float((torch.from_numpy(probe.predict(test)) == test_labels_M).double().mean())
