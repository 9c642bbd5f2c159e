"""A data set that is a model: images that are learnt, with their labels and the step size to train on them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data.images import Images


class SyntheticImages(nn.Module):
    """Learnable images.

    Attributes:
        pixels: (M, C, H, W), a parameter.
        step_size: of the student's SGD, a parameter of no dimensions.
        labels: (M,), a buffer.
    """

    labels: Tensor

    def __init__(self, pixels: Tensor, labels: Tensor, *, step_size: float) -> None:
        super().__init__()
        self.pixels = nn.Parameter(pixels.clone())
        self.step_size = nn.Parameter(torch.tensor(step_size))
        self.register_buffer("labels", labels.clone())

    def forward(self) -> Tensor:
        """The images."""
        return self.pixels


def images_per_class(images: Images, count: int, *, seed: int) -> Tensor:
    """Positions (classes * count,) of ``count`` images of each class, drawn by the seed, class by class.

    Raises ``ValueError`` where a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(images.classes):
        found = (images.labels == label).nonzero().flatten()
        if len(found) < count:
            raise ValueError(f"class {name} has {len(found)} images, of which {count} are wanted")
        chosen.append(found[torch.randperm(len(found), generator=generator)[:count]])
    return torch.cat(chosen)


def to_dataset(pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Any:
    """Images as a ``datasets.Dataset``: ``pixels``, float32 arrays (C, H, W) as they were learnt, and ``label``."""
    import datasets

    channels, height, width = pixels.shape[1:]
    features = datasets.Features(
        {
            "pixels": datasets.Array3D((channels, height, width), "float32"),
            "label": datasets.ClassLabel(names=list(classes)),
        }
    )
    return datasets.Dataset.from_dict({"pixels": pixels.numpy(), "label": labels.tolist()}, features=features)


def from_parquet(file: Path, classes: tuple[str, ...]) -> Images:
    """The images that `to_dataset` wrote."""
    import datasets

    rows = datasets.Dataset.from_parquet(str(file), keep_in_memory=True).with_format("torch")
    return Images(torch.stack(list(rows["pixels"])), torch.as_tensor(list(rows["label"])), classes, str(file))
