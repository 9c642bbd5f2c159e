"""Figures of classifiers: accuracy, likelihood, calibration, selective risk, agreement with a reference.

Shapes: N samples, V classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch
from stillhouse.metrics.calibration import Reliability


@dataclass
class ClassificationFigures:
    """What follows from a classifier's predictions on some samples."""

    accuracy: float
    nll: float  # nats
    aurc: float
    entropy: float  # mean of the predictions', nats
    agreement: float
    kl: float  # mean KL(reference || model), nats
    samples: int
    reliability: Reliability = field(default_factory=Reliability)

    @property
    def ece(self) -> float:
        """Expected calibration error of the most likely class, 15 bins."""
        return self.reliability.ece


def aurc(confidence_N: Tensor, correct_N: Tensor) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2019, arXiv 1805.08206).

    The mean, over coverages k/N, of the error rate among the k most confident predictions; lower is better. Equal
    confidences keep the order of the samples. A perfect ranking with error rate r tends to r + (1 - r) ln(1 - r).
    """
    order_N = confidence_N.double().argsort(descending=True, stable=True)
    wrong_N = 1.0 - correct_N.double()[order_N]
    covered_N = torch.arange(1, len(wrong_N) + 1, dtype=torch.float64)
    return float((wrong_N.cumsum(0) / covered_N).mean())


def figures_of(logits_NV: Tensor, labels_N: Tensor, *, reference_NV: Tensor | None = None) -> ClassificationFigures:
    """Figures of logits (N, V) against labels (N,); agreement and KL are against the ``reference`` logits, if any."""
    log_q_NV = logits_NV.double().log_softmax(-1)
    best_N, guess_N = log_q_NV.max(-1)
    correct_N = guess_N == labels_N
    reliability = Reliability()
    reliability.add(best_N.exp(), correct_N)
    log_p_NV = log_q_NV if reference_NV is None else reference_NV.double().log_softmax(-1)
    return ClassificationFigures(
        accuracy=correct_N.double().mean().item(),
        nll=-log_q_NV.gather(1, labels_N[:, None]).mean().item(),
        aurc=aurc(best_N.exp(), correct_N),
        entropy=-(log_q_NV.exp() * log_q_NV).sum(-1).mean().item(),
        agreement=(guess_N == log_p_NV.argmax(-1)).double().mean().item(),
        kl=(log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean().item(),
        samples=len(labels_N),
        reliability=reliability,
    )


@torch.no_grad()
def predict(models: Mapping[str, nn.Module], batches: Iterable[Batch]) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (N, V) of several classifiers on the same batches, and the labels (N,), on the CPU.

    ``batches`` hold ``pixel_values`` and ``labels``. Models should be in evaluation mode.
    """
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    for batch in batches:
        labels.append(batch["labels"].cpu())
        for name, model in models.items():
            logits[name].append(model(pixel_values=batch["pixel_values"]).logits.float().cpu())
    return {name: torch.cat(pieces) for name, pieces in logits.items()}, torch.cat(labels)


def compare_classifiers(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], *, reference: str | None = None
) -> dict[str, ClassificationFigures]:
    """Figures of several classifiers on the same batches; agreement and KL are against ``reference``."""
    logits, labels_N = predict(models, batches)
    against_NV = logits[reference] if reference else None
    return {name: figures_of(own_NV, labels_N, reference_NV=against_NV) for name, own_NV in logits.items()}


@torch.no_grad()
def images_per_second(model: Any, batch: Batch, *, seconds: float = 0.2) -> float:
    """Images a model classifies per second, best of the rounds that fit into ``seconds``."""
    pixels = batch["pixel_values"]
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        model(pixel_values=pixels)
        if pixels.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return len(pixels) / best
