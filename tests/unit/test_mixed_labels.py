"""Mixed images in a stage of a vision system."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from stillhouse.data.images import digits
from stillhouse.data.sources import Batches
from stillhouse.tasks.mixed_labels import labels_entry, mixed


def stage(**mixing: float) -> Any:
    task: Any = SimpleNamespace(classes=tuple("0123456789"), system=SimpleNamespace(seed=3))
    source = Batches(digits("train"), 16, seed=3, gather=True)
    return mixed(SimpleNamespace(source=source), task, **mixing)  # type: ignore[arg-type]


def test_images_and_labels_are_mixed_alike():
    plain, made = next(stage(mixup=0.0, cutmix=0.0).source), next(stage(mixup=1.0, cutmix=0.0).source)
    assert "soft_labels" not in plain and torch.equal(plain["labels"], made["labels"])
    share = made["soft_labels"][torch.arange(16), made["labels"]].min()  # of the image itself, where the other differs
    assert 0 < share < 1
    expected = share * plain["pixel_values"] + (1 - share) * plain["pixel_values"].flip(0)
    torch.testing.assert_close(made["pixel_values"], expected)
    torch.testing.assert_close(made["soft_labels"].sum(-1), torch.ones(16))
    assert ((made["soft_labels"] > 0).sum(-1) <= 2).all()  # no smoothing: USKD has at most two targets


def test_the_entry_of_the_labels():
    assert labels_entry(mixup=0.0, cutmix=0.0) == "labels"
    assert labels_entry(mixup=0.8, cutmix=0.0) == labels_entry(mixup=0.0, cutmix=1.0) == "soft_labels"
