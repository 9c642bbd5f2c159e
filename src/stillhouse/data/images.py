"""Labelled images: the digits that come with scikit-learn, and the user's own folders and data sets.

`Images` is a map-style data set that is read by lists of positions, so `Batches(images, 64, gather=True)` makes
batches of it: ``pixel_values`` (B, C, H, W), ``labels`` (B,) and ``index`` (B,), the position of each sample in the
data set. What is drawn afresh for every batch (noise, shifts, flips) is a function of the batch and a generator,
applied by `Augmented`.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.base.errors import DataError, near, one_line, suggest
from stillhouse.data.sources import Change

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "selection", "test", "all"]
DIGITS_TRAIN, DIGITS_SELECTION = 1000, 200  # of 1,797; the other 597 are for the final measurement
IN_MEMORY = 2**30  # bytes of pixels up to which images are decoded once and kept

"""Makes another batch of a batch, with randomness from the generator alone."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images.

    Attributes:
        pixels: (N, C, H, W) float32, or a `PixelReader` that decodes them when asked.
        labels: (N,) int64.
        classes: the names of the labels.
        name: what the user asked for.
    """

    pixels: Tensor | PixelReader
    labels: Tensor
    classes: tuple[str, ...]
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(positions)
        pixels = self.pixels[index] if isinstance(self.pixels, Tensor) else self.pixels[list(positions)]
        return {"pixel_values": pixels, "labels": self.labels[index], "index": index}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        first = self.pixels[:1] if isinstance(self.pixels, Tensor) else self.pixels[[0]]
        return cast(tuple[int, int, int], tuple(first.shape[1:]))

    def select(self, positions: Tensor) -> Images:
        """The images at ``positions`` (M,) as a data set of their own; their ``index`` counts from 0 again."""
        pixels = self.pixels
        chosen = pixels[positions] if isinstance(pixels, Tensor) else pixels.select(positions.tolist())
        return replace(self, pixels=chosen, labels=self.labels[positions])

    def fingerprint(self) -> str:
        """sha256 (hex) of the pixels (or of the identity of a data set on disk) and the labels."""
        pixels = self.pixels.numpy().tobytes() if isinstance(self.pixels, Tensor) else self.pixels.identity.encode()
        return hashlib.sha256(pixels + self.labels.numpy().tobytes()).hexdigest()


# -- the embedded images --------------------------------------------------------------------------------------------


def digits(
    split: Split = "train", *, size: int | None = None, noise: float = 0.0, label_noise: float = 0.0, seed: int = 0
) -> Images:
    """Handwritten digits, 8 x 8, in [0, 1]: scikit-learn's copy of the UCI set (Alpaydin and Kaynak, 1998).

    The split is the same always: 1,000 images to train on, 200 to select by, 597 for the final measurement.

    Args:
        size: so many of them only, drawn by ``seed``; None takes all.
        noise: standard deviation of Gaussian noise on the pixels, drawn once by ``seed``. For noise that is drawn
            anew in every batch see `gaussian_noise`.
        label_noise: share of the labels replaced by another one, drawn by ``seed``.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    begin, end = {
        "train": (0, DIGITS_TRAIN),
        "selection": (DIGITS_TRAIN, DIGITS_TRAIN + DIGITS_SELECTION),
        "test": (DIGITS_TRAIN + DIGITS_SELECTION, len(order)),
        "all": (0, len(order)),
    }[split]
    chosen = order[begin:end]
    pixels = torch.as_tensor(bunch.images, dtype=torch.float32)[chosen, None] / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)[chosen]
    images = Images(pixels, labels, tuple(map(str, range(10))), "demo")
    if size is not None:
        images = subset(images, size, seed=seed)
    if label_noise:
        images = with_label_noise(images, label_noise, seed=seed)
    return with_noise(images, noise, seed=seed) if noise else images


def subset(images: Images, size: int, *, seed: int = 0) -> Images:
    """``size`` of the images, drawn without replacement."""
    if not 1 <= size <= len(images):
        raise DataError(f"{images.name}: {size} images wanted, it has {len(images)}; ask for at most that many")
    return images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:size])


def with_label_noise(images: Images, share: float, *, seed: int = 0) -> Images:
    """The images with ``round(share * N)`` labels replaced, each by one of the other classes."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(images), generator=generator)[: round(share * len(images))]
    labels = images.labels.clone()
    away = torch.randint(1, len(images.classes), (len(wrong),), generator=generator)
    labels[wrong] = (labels[wrong] + away) % len(images.classes)
    return replace(images, labels=labels)


def with_noise(images: Images, std: float, *, seed: int = 0) -> Images:
    """The images with Gaussian noise that is drawn once: every reader sees the same."""
    if not isinstance(images.pixels, Tensor):
        return replace(images, pixels=replace(images.pixels, noise=std, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    return replace(images, pixels=images.pixels + std * torch.randn(images.pixels.shape, generator=generator))


# -- clients --------------------------------------------------------------------------------------------------------


def dirichlet_shares(classes: int, clients: int, *, alpha: float, seed: int = 0) -> Tensor:
    """How each class is divided among clients, (classes, clients): rows drawn from a symmetric Dirichlet(alpha).

    Small ``alpha``: few clients hold most of a class (Hsu, Qi and Brown, 2019, arXiv 1909.06335).
    """
    import numpy as np

    drawn = np.random.default_rng(seed).dirichlet([alpha] * clients, size=classes)
    return torch.from_numpy(drawn)


def partition(labels: Tensor, shares: Tensor, *, seed: int = 0) -> list[Tensor]:
    """Positions (n_k,) of each client's samples: every sample goes to exactly one client.

    Args:
        labels: (N,).
        shares: (classes, clients) of `dirichlet_shares`; the same shares divide a test set in the same proportions.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(shares.shape[1])]
    for label, share in enumerate(shares):
        found = torch.nonzero(labels == label).flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        cuts = (share.cumsum(0)[:-1] * len(found)).round().long().tolist()
        for part, piece in zip(parts, torch.tensor_split(found, cuts), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


# -- what is drawn anew in every batch ------------------------------------------------------------------------------


def gaussian_noise(std: float) -> Change:
    """Add Gaussian noise of this standard deviation to the pixels."""

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        pixels = batch["pixel_values"]
        return {**batch, "pixel_values": pixels + std * torch.randn(pixels.shape, generator=generator)}

    return change


def random_flip(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Mirror each image left to right with probability 1/2."""
    pixels = batch["pixel_values"]
    flipped = torch.rand(len(pixels), generator=generator) < 0.5
    return {**batch, "pixel_values": torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)}


def random_shift(most: int) -> Change:
    """Move each image by up to ``most`` pixels both ways; zeros come in (the "random crop" of CIFAR recipes)."""

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        pixels = batch["pixel_values"]
        count, _, height, width = pixels.shape
        padded = F.pad(pixels, (most,) * 4)
        top, left = torch.randint(2 * most + 1, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        index = torch.arange(count)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return {**batch, "pixel_values": moved.contiguous()}

    return change


def in_turn(changes: Sequence[Change]) -> Change:
    """Several changes, one after the other."""

    def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        for one in changes:
            batch = one(batch, generator)
        return batch

    return change


# -- the user's images ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PixelReader:
    """Images of a ``datasets.Dataset`` as tensors, decoded when asked: ``reader[[3, 5]]`` is (2, C, H, W).

    Args:
        rows: with the column ``image``, not decoded: ``{"bytes": ..., "path": ...}``.
        process: PIL images to a tensor (B, C, H, W): an image processor of transformers.
        channels: 1 or 3.
        noise, seed: Gaussian noise that depends on the seed and the row.
    """

    rows: datasets.Dataset
    process: Callable[[list[Any]], Tensor]
    channels: int = 3
    noise: float = 0.0
    seed: int = 0

    @property
    def identity(self) -> str:
        return str(self.rows._fingerprint)

    def select(self, positions: list[int]) -> PixelReader:
        return replace(self, rows=self.rows.select(positions))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> Tensor:
        pixels = self.process([self._decoded(position) for position in positions])
        if self.noise:
            drawn = [
                torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(self.seed * 1_000_003 + position))
                for position in positions
            ]
            pixels = pixels + self.noise * torch.stack(drawn)
        return pixels

    def _decoded(self, position: int) -> Any:
        from PIL import Image

        stored = self.rows[position]["image"]
        try:
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
                return image.convert("L" if self.channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            where = f"row {position}" if not stored or not stored.get("path") else stored["path"]
            raise DataError(
                f"{where}: not a readable image ({one_line(error)}); put it right or take it out"
            ) from error


@dataclass(frozen=True)
class ImageRows:
    """Images and labels that are not decoded yet: ``train`` and, where the data has one, ``test``."""

    train: datasets.Dataset
    test: datasets.Dataset | None
    classes: tuple[str, ...]
    name: str

    def images(self, rows: datasets.Dataset, process: Callable[[list[Any]], Tensor], channels: int) -> Images:
        """`Images` of some rows; decoded at once if they fit into a gibibyte."""
        reader = PixelReader(rows, process, channels)
        labels = torch.tensor(rows["label"], dtype=torch.int64)
        images = Images(reader, labels, self.classes, self.name)
        if math.prod(images.shape) * 4 * len(rows) > IN_MEMORY:
            return images
        pieces = [reader[list(range(at, min(at + 256, len(rows))))] for at in range(0, len(rows), 256)]
        return replace(images, pixels=torch.cat(pieces))


def load_images(
    source: str,
    *,
    split: str = "train",
    test_split: str | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
) -> ImageRows:
    """Read a folder with a folder of images per class, a Parquet file (or a folder of them), or a hub data set.

    Args:
        split: what to train on; a folder of class folders is one split, ``train``, unless it has folders ``train`` and
            ``test`` with the class folders in them.
        test_split: what to measure on; by default ``test`` or ``validation`` where the data has one.
        image_field, label_field: the columns; by default the first with images, and ``label``, ``labels`` or
            ``fine_label``.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    found = _load(source)
    if split not in found:
        raise DataError(f"{source}: no split {split!r}{suggest(split, found)}")
    if test_split is not None and test_split not in found:
        raise DataError(f"{source}: no split {test_split!r}{suggest(test_split, found)}")
    names = [test_split] if test_split else [name for name in ("test", "validation", "valid", "val") if name in found]
    others = [name for name in names if name != split]
    train, classes = _columns(found[split], source, image_field, label_field)
    test = None
    if others:
        test, other_classes = _columns(found[others[0]], source, image_field, label_field)
        if other_classes != classes:
            raise DataError(f"{source}: split {others[0]!r} has other classes than {split!r}; give them the same")
    return ImageRows(train, test, classes, source)


def _load(source: str) -> Any:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_dir():
            packed = any(path.rglob("*.parquet"))
            if not packed and not any(entry.is_dir() for entry in path.iterdir()):
                raise DataError(f"{source}: no folders of images in it; make one folder for each class")
            if packed:
                return datasets.load_dataset(str(path))
            return datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=False, drop_metadata=True)
        if path.is_file():
            if path.suffix.lower() != ".parquet":
                raise DataError(f"{source}: a {path.suffix} file; give a folder of class folders, or a .parquet file")
            return datasets.load_dataset("parquet", data_files=str(path))
        if path.is_absolute() or source.count("/") > 1 or source.startswith((".", "~")):
            raise DataError(f"{source}: no such file or folder{near(path) or '; check the path'}")
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None)
    except DataError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{source}: no such file, folder or hub data set{near(path) or '; check the name'}") from error
    except (ConnectionError, TimeoutError) as error:
        raise DataError(
            f"{source}: no such file or folder, and the hub cannot be reached; give a local path, or go online"
        ) from error
    except Exception as error:
        raise DataError(f"{source}: cannot be read as images ({one_line(error)}); check its files") from error


def _columns(
    rows: Any, source: str, image_field: str | None, label_field: str | None
) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """The rows with the columns ``image`` (not decoded) and ``label`` (numbers), and the names of the classes."""
    import datasets

    features = rows.features
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = image_field or next(iter(pictures), "image")
    label = label_field or next((name for name in ("label", "labels", "fine_label") if name in features), "label")
    for wanted, field in ((image, "image_field"), (label, "label_field")):
        if wanted not in features:
            raise DataError(f"{source}: no column {wanted!r}{suggest(wanted, features)}; name it with {field}=COLUMN")
    rows = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    kind = features[label]
    if not isinstance(kind, datasets.ClassLabel):
        values = rows.with_format(None)[label]
        if any(value is None for value in values):
            raise DataError(f"{source}: row {list(values).index(None)} has no {label}; label it or take it out")
        rows = rows.class_encode_column(label)
        kind = rows.features[label]
    rows = rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
    return rows, tuple(kind.names)
