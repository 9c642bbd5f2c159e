"""Images of a task: the fields that say where they come from, and how they are divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Lt

from stillhouse.base.errors import DataError
from stillhouse.core.system import System
from stillhouse.data.images import ImageRows, load_images

DEMO = "demo"


@dataclass(kw_only=True)
class ImageSystem(System):
    """Fields of every system with a teacher, a student and labelled images; each task says what models it takes."""

    teacher: Annotated[str, "directory or hub id of a model, or 'demo'"] = DEMO
    student: Annotated[str, "directory or hub id of a model, or the teacher's architecture with other sizes"]
    data: Annotated[str, "folder with a folder of images per class, .parquet file, hub data set id, or 'demo'"] = DEMO
    split: Annotated[str, "split of the data set that is trained on"] = "train"
    test_split: Annotated[str | None, "split for the final measurement; found by itself by default"] = None
    image_field: Annotated[str | None, "column that holds the images; found by itself by default"] = None
    label_field: Annotated[str | None, "column that holds the labels; found by itself by default"] = None
    test: Annotated[
        float, "share held out for the final measurement, where the data has no split for it", Gt(0), Lt(1)
    ] = 0.1

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO

    def image_rows(self) -> ImageRows:
        """The user's images, not yet decoded."""
        return load_images(
            self.data,
            split=self.split,
            test_split=self.test_split,
            image_field=self.image_field,
            label_field=self.label_field,
        )


def held_out(count: int, shares: Sequence[float], *, name: str) -> list[list[int]]:
    """Positions of ``count`` images in random order: a part for each share, at least one image, and then the rest.

    A share of 0 is an empty part. The order does not depend on the run's seed: no teacher of an earlier run has seen
    any of what is held out.

    Raises:
        DataError: nothing would be left.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [max(1, round(share * count)) if share else 0 for share in shares]
    if sum(sizes) >= count:
        raise DataError(f"{name}: {count} images are too few to hold some out; give more")
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [order[start:end] for start, end in zip([0, *ends], [*ends, count], strict=True)]
