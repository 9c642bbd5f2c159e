"""The user's images for promptable segmentation: a folder, with or without masks in SA-1B's format, or a hub data set.

An item is what `stillhouse.data.shapes.Shapes` yields as far as it is known: ``image`` (3, S, S) and ``inside``
(S, S), where the picture ends and the padding begins; with annotations also ``masks`` (K, S, S) and ``points`` (K, 2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.base.errors import DataError, near, one_line
from stillhouse.data.shapes import described

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Fit:
    """How pictures are made S x S: the longer side becomes S, the rest is padded on the right and below.

    ``mean`` and ``std`` (3,) are applied before padding, so padding is zero, as SAM's own processor does it.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def scale(self, width: int, height: int) -> float:
        return self.size / max(width, height)

    def image(self, picture: Any) -> dict[str, Tensor]:
        """``image`` and ``inside`` of a PIL image."""
        from PIL import Image

        width, height = (max(1, round(side * self.scale(*picture.size))) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return {"image": self.pad(pixels), "inside": self.pad(torch.ones(height, width)).bool()}

    def masks(self, masks_KHW: Tensor) -> Tensor:
        """Masks of the original picture, brought to S x S."""
        height, width = masks_KHW.shape[1:]
        size = [max(1, round(side * self.scale(width, height))) for side in (height, width)]
        return self.pad(F.interpolate(masks_KHW[None].float(), size=size, mode="nearest-exact")[0]).bool()

    def pad(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, self.size - values.shape[-1], 0, self.size - values.shape[-2]))


@dataclass(frozen=True)
class Segments:
    """A map-style data set of pictures; see the module. ``most``: annotated objects taken of each picture."""

    pictures: Any
    fit: Fit
    most: int = 16

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture, notes = self.pictures[index]
        item = self.fit.image(picture)
        if not notes:
            return item
        masks = [decode_rle(note["segmentation"]) for note in notes[: self.most]]
        fitted_KHW = self.fit.masks(torch.stack(masks))
        whole = fitted_KHW.flatten(1).any(1)  # what became smaller than a pixel is left out
        if not whole.any():
            return item
        found = described(fitted_KHW[whole])
        given = [note.get("point_coords") for note in notes[: self.most]]
        if all(given):
            scale = self.fit.scale(*picture.size)
            found["points"] = torch.tensor([point[0] for point in given])[whole].float() * scale
        return item | {"masks": fitted_KHW[whole], **found}


@dataclass(frozen=True)
class Folder:
    """Pictures of a folder; beside each, where there is one, a ``.json`` of the same name with its annotations."""

    files: list[Path]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, list[dict[str, Any]]]:
        from PIL import Image

        file = self.files[index]
        notes = file.with_suffix(".json")
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{file}: not a readable image ({one_line(error)}); put it right or take it out") from error
        if not notes.exists():
            return picture, []
        try:
            return picture, list(json.loads(notes.read_text(encoding="utf-8"))["annotations"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{notes}: no annotations in SA-1B's format ({one_line(error)}); put it right or take it out"
            ) from error


@dataclass(frozen=True)
class Rows:
    """Pictures of a hub data set, without annotations."""

    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, list[dict[str, Any]]]:
        return self.rows[index][self.column], []


def load_segments(source: str, fit: Fit, *, split: str = "train") -> Segments:
    """Pictures of a folder (and the folders in it) or of a hub data set.

    Raises:
        DataError: nothing there, or no pictures in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if not files:
            raise DataError(f"{source}: no pictures in it ({', '.join(PICTURES)}); give a folder that has some")
        return Segments(Folder(files), fit)
    if path.exists() or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such folder{near(path) or '; check the path'}")
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise DataError(f"{source}: no such folder, and no hub data set either ({one_line(error)})") from error
    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise DataError(f"{source}: no column of images; its columns: {', '.join(rows.features)}")
    return Segments(Rows(rows, columns[0]), fit)


def decode_rle(code: dict[str, Any]) -> Tensor:
    """A mask (H, W) from COCO's run-length code ``{"size": [H, W], "counts": ...}``: runs of 0 and 1 in turn, down the
    columns. ``counts`` is a list of lengths, or text in which each is written in base 32, less the last but one.
    """
    height, width = code["size"]
    counts = code["counts"] if isinstance(code["counts"], list) else _lengths(code["counts"])
    if sum(counts) != height * width:
        raise DataError(
            f"a mask's run lengths sum to {sum(counts)}, its size is {height} x {width}; the file is damaged"
        )
    runs = np.repeat(np.arange(len(counts)) % 2, counts)
    return torch.from_numpy(runs.reshape(width, height).T.astype(bool))


def _lengths(text: str) -> list[int]:
    lengths: list[int] = []
    letters: Iterable[int] = (ord(letter) - 48 for letter in text)
    value, shift = 0, 0
    for letter in letters:
        value |= (letter & 31) << shift
        shift += 5
        if letter & 32:
            continue
        if letter & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value, shift = 0, 0
    return lengths
