"""How a task's images are divided, and what clients can tell of theirs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stillhouse.base.errors import DataError
from stillhouse.data.rows import TensorRows
from stillhouse.tasks.condensation import CondensationSystem
from stillhouse.tasks.federation import Federation, prototypes
from stillhouse.tasks.image_data import ImageSystem, held_out
from stillhouse.tasks.masked_images import MaskedImageSystem
from stillhouse.tasks.vision import VisionSystem


def test_parts_are_apart_and_complete():
    selected, tested, rest = held_out(50, (0.1, 0.2), name="x")
    assert [len(selected), len(tested), len(rest)] == [5, 10, 35]
    assert sorted([*selected, *tested, *rest]) == list(range(50))
    assert [*selected, *tested, *rest] == torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()


def test_a_share_of_zero_is_empty_and_any_other_at_least_one():
    assert [len(part) for part in held_out(20, (0.001, 0.0), name="x")] == [1, 0, 19]


def test_something_must_be_left():
    with pytest.raises(DataError, match="x: 2 images are too few"):
        held_out(2, (0.4, 0.4), name="x")


@pytest.mark.parametrize("system", [VisionSystem, MaskedImageSystem])
def test_fields_of_images_are_declared_once(system):
    shared = {field.name for field in dataclasses.fields(ImageSystem)} - {"seed", "teacher", "student", "trackers"}
    assert {"data", "split", "test_split", "image_field", "label_field", "test"} <= shared
    assert not shared & set(vars(system)["__annotations__"])
    assert not issubclass(CondensationSystem, ImageSystem)  # it has no teacher


def _told() -> TensorRows:
    generator = torch.Generator().manual_seed(0)
    client = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    labels = torch.tensor([0, 0, 2, 0, 2, 2, 2])
    return TensorRows(
        {"client": client, "labels": labels, "inputs": torch.randn(7, 4, 3, 3, generator=generator)},
    )


def test_prototypes_are_the_means_over_all_images_though_only_means_travel():
    told = _told()

    class Told(Federation):
        def __init__(self) -> None:
            pass

        def upload(self, *_, **__):  # what would be sent if images' representations were
            return told

    means = Told().class_means([], 1)
    assert means.columns["client"].tolist() == [0, 0, 1, 1]
    assert means.columns["labels"].tolist() == [0, 2, 0, 2]
    assert means.columns["count"].tolist() == [2, 1, 1, 3]
    pooled, labels = told.columns["inputs"].mean((2, 3)), told.columns["labels"]
    found = prototypes(means, 3)
    for label in (0, 2):
        torch.testing.assert_close(found[label], pooled[labels == label].mean(0))
    assert not found[1].any()  # a class that nobody has
