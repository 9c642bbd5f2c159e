"""Figures of text classifiers and of models that predict a number, as GLUE has them.

Shapes: N examples, V classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def classification_scores(logits_NV: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Accuracy, F1 (of class 1 of two, else the mean over classes), Matthews' correlation, loss in nats."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    guess, truth = logits_NV.argmax(-1).numpy(), labels_N.numpy()
    average = "binary" if logits_NV.shape[-1] == 2 else "macro"
    return {
        "accuracy": float((guess == truth).mean()),
        "f1": float(f1_score(truth, guess, average=average, zero_division=0.0)),
        "mcc": float(matthews_corrcoef(truth, guess)),
        "nll": float(torch.nn.functional.cross_entropy(logits_NV.double(), labels_N)),
    }


def regression_scores(values_N: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 for a constant prediction) and the mean squared error."""
    from scipy.stats import pearsonr, spearmanr

    found, truth = values_N.double().numpy(), labels_N.double().numpy()
    flat = len(found) < 2 or np.ptp(found) == 0 or np.ptp(truth) == 0
    return {
        "pearson": 0.0 if flat else float(pearsonr(found, truth).statistic),
        "spearman": 0.0 if flat else float(spearmanr(found, truth).statistic),
        "mse": float(((found - truth) ** 2).mean()),
    }


def agreement_scores(logits_NV: Tensor, reference_NV: Tensor) -> dict[str, float]:
    """How often the likeliest class is the reference's, and the mean KL(reference || model) in nats."""
    log_q, log_p = logits_NV.double().log_softmax(-1), reference_NV.double().log_softmax(-1)
    return {
        "agreement": float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()),
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
    }
