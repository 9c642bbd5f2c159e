"""Images: the embedded digits, partitions among clients, what is drawn anew in every batch, the user's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.base.errors import DataError
from stillhouse.data.images import (
    Images,
    digits,
    dirichlet_shares,
    gaussian_noise,
    in_turn,
    load_images,
    partition,
    random_flip,
    random_shift,
    subset,
    with_label_noise,
    with_noise,
)
from stillhouse.data.sources import Augmented, Batches


def keys(images: Images) -> set[bytes]:
    assert isinstance(images.pixels, Tensor)
    return {image.numpy().tobytes() for image in images.pixels}


# -- digits ---------------------------------------------------------------------------------------------------------


def test_the_split_of_the_digits_covers_all_and_shares_nothing():
    parts = [digits("train"), digits("selection"), digits("test")]
    assert [len(part) for part in parts] == [1000, 200, 597]
    assert set.union(*map(keys, parts)) == keys(digits("all"))
    assert not keys(parts[0]) & keys(parts[2]) and not keys(parts[0]) & keys(parts[1])
    first = parts[0]
    assert first.shape == (1, 8, 8) and first.classes == tuple("0123456789")
    assert isinstance(first.pixels, Tensor) and (first.pixels.min(), first.pixels.max()) == (0.0, 1.0)
    assert digits("train").fingerprint() == first.fingerprint() != parts[2].fingerprint()


def test_a_subset_and_its_labels_are_fixed_by_the_seed():
    some, again, other = (digits(size=50, label_noise=0.2, noise=0.1, seed=seed) for seed in (3, 3, 4))
    assert some.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(some) == 50 and keys(digits(size=50, seed=3)) <= keys(digits())
    with pytest.raises(DataError, match="1001 images wanted, it has 1000"):
        subset(digits(), 1001)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_label_noise_changes_exactly_that_share_to_other_classes(share):
    images = digits()
    changed = with_label_noise(images, share, seed=1).labels != images.labels
    assert int(changed.sum()) == round(share * 1000)


def test_label_noise_is_spread_over_the_other_classes():
    images = digits()
    noisy = with_label_noise(images, 1.0)
    moved = (noisy.labels - images.labels) % 10
    counts = torch.bincount(moved, minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 70  # 111 expected


def test_noise_that_is_drawn_once_has_the_given_deviation():
    images = digits("test")
    noisy = with_noise(images, 0.35)
    assert isinstance(noisy.pixels, Tensor) and isinstance(images.pixels, Tensor)
    assert (noisy.pixels - images.pixels).std().item() == pytest.approx(0.35, rel=0.02)


def test_a_batch_names_its_samples():
    batch = digits()[[7, 3]]
    assert batch["index"].tolist() == [7, 3]
    assert torch.equal(batch["labels"], digits().labels[[7, 3]])
    chosen = digits().select(torch.tensor([9, 3]))
    assert torch.equal(chosen[[1]]["pixel_values"], batch["pixel_values"][1:]) and chosen[[1]]["index"].tolist() == [1]


# -- clients --------------------------------------------------------------------------------------------------------


@given(clients=st.integers(1, 12), alpha=st.floats(0.05, 50), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_sample_goes_to_exactly_one_client(clients, alpha, seed):
    labels = digits().labels
    parts = partition(labels, dirichlet_shares(10, clients, alpha=alpha, seed=seed), seed=seed)
    assert len(parts) == clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))


def test_shares_are_kept_class_by_class():
    labels = torch.arange(10).repeat_interleave(1000)
    shares = dirichlet_shares(10, 4, alpha=0.3, seed=5)
    assert torch.allclose(shares.sum(1), torch.ones(10, dtype=torch.float64))
    for client, part in enumerate(partition(labels, shares)):
        found = torch.bincount(labels[part], minlength=10) / 1000
        torch.testing.assert_close(found.double(), shares[:, client], atol=1.1e-3, rtol=0)


def test_small_alpha_is_unequal_and_large_alpha_equal():
    spread = [dirichlet_shares(200, 5, alpha=alpha).std(1).mean().item() for alpha in (0.1, 1.0, 100.0)]
    assert spread[0] > 0.3 > spread[1] > 0.1 > spread[2]


# -- augmentation ---------------------------------------------------------------------------------------------------


def source(seed: int = 0) -> Augmented:
    change = in_turn([random_shift(2), random_flip, gaussian_noise(0.1)])
    return Augmented(Batches(digits(size=40), 16, seed=seed, gather=True), change, seed=seed)


def test_what_is_drawn_resumes():
    whole = source()
    batches = [next(whole) for _ in range(7)]
    begun = source()
    for _ in range(3):
        next(begun)
    resumed = source()
    resumed.load_state_dict(begun.state_dict())
    for batch in batches[3:]:
        found = next(resumed)
        assert all(torch.equal(batch[key], found[key]) for key in batch)
    assert whole.epoch == resumed.epoch == 3
    assert not torch.equal(batches[0]["pixel_values"], next(source(1))["pixel_values"])


def test_the_same_image_is_changed_anew_every_time():
    images = digits(size=4)
    stream = Augmented(Batches(images, 4, shuffle=False, gather=True), gaussian_noise(0.1))
    first, second = next(stream), next(stream)
    assert torch.equal(first["index"], second["index"])
    assert (first["pixel_values"] - second["pixel_values"]).std().item() == pytest.approx(0.1 * 2**0.5, rel=0.2)


@given(most=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_shift_moves_whole_images(most, seed):
    """Every result is the image cut out of the padded one at one of the allowed places."""
    pixels = torch.arange(1.0, 2 * 2 * 5 * 4 + 1).view(2, 2, 5, 4)
    generator = torch.Generator().manual_seed(seed)
    moved = random_shift(most)({"pixel_values": pixels}, generator)["pixel_values"]
    padded = torch.nn.functional.pad(pixels, (most,) * 4)
    places = range(2 * most + 1)
    for image, source_image in zip(moved, padded, strict=True):
        cuts = [source_image[:, top : top + 5, left : left + 4] for top in places for left in places]
        assert any(torch.equal(image, cut) for cut in cuts)


def test_shifts_and_flips_reach_all_their_places():
    one = torch.zeros(400, 1, 3, 3)
    one[:, :, 1, 1] = 1
    moved = random_shift(1)({"pixel_values": one}, torch.Generator().manual_seed(0))["pixel_values"]
    assert set(moved.flatten(1).argmax(1).tolist()) == set(range(9))
    side = torch.zeros(400, 1, 1, 2)
    side[..., 0] = 1
    flipped = random_flip({"pixel_values": side}, torch.Generator().manual_seed(0))["pixel_values"]
    assert 150 < flipped[..., 1].sum() < 250 and torch.equal(flipped.sum(-1), torch.ones(400, 1, 1))


# -- the user's files -----------------------------------------------------------------------------------------------


def write(file: Path, value: int) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, value, value)).save(file)


def mean_colour(images: list[Any]) -> Tensor:
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(image, dtype="float32")).permute(2, 0, 1) for image in images]) / 255


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / "data" / "cat" / f"{number}.png", 0)
        write(tmp_path / "data" / "dog" / f"{number}.png", 255)
    return tmp_path / "data"


def test_a_folder_of_folders(folder):
    rows = load_images(str(folder))
    assert rows.classes == ("cat", "dog") and rows.test is None
    images = rows.images(rows.train, mean_colour, 3)
    assert images.shape == (3, 4, 6) and len(images) == 6
    assert isinstance(images.pixels, Tensor)
    assert torch.equal(images.pixels.mean((1, 2, 3)).long(), images.labels)  # cats are black, dogs are white


def test_folders_for_training_and_test(folder):
    for part, number in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            for one in range(number):
                write(folder.parent / "both" / part / name / f"{one}.png", 10)
    rows = load_images(str(folder.parent / "both"))
    assert rows.test is not None and (len(rows.train), len(rows.test)) == (4, 2)
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        load_images(str(folder.parent / "both"), split="trian")


def test_a_parquet_file_with_names_for_labels(folder, tmp_path):
    import datasets

    files = sorted(folder.rglob("*.png"))
    table = datasets.Dataset.from_dict(
        {"picture": [str(file) for file in files], "kind": [file.parent.name for file in files]}
    ).cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "pets.parquet")
    with pytest.raises(DataError, match=r"no column 'label'.*label_field=COLUMN"):
        load_images(str(tmp_path / "pets.parquet"))
    rows = load_images(str(tmp_path / "pets.parquet"), label_field="kind")
    assert rows.classes == ("cat", "dog")
    images = rows.images(rows.train, mean_colour, 3)
    assert isinstance(images.pixels, Tensor) and torch.equal(images.pixels.mean((1, 2, 3)).long(), images.labels)


def test_large_data_is_decoded_when_asked(folder, monkeypatch):
    from stillhouse.data import images as module

    rows = load_images(str(folder))
    kept = rows.images(rows.train, mean_colour, 3)
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    read = rows.images(rows.train, mean_colour, 3)
    assert isinstance(kept.pixels, Tensor) and not isinstance(read.pixels, Tensor)
    chosen = torch.tensor([5, 0, 2])
    for images in (kept, read):
        batch = images.select(chosen)[[0, 2]]
        assert torch.equal(batch["pixel_values"], kept.pixels[[5, 2]])
        assert torch.equal(batch["labels"], kept.labels[[5, 2]])
    noisy = with_noise(read, 0.5, seed=1)
    once, again = noisy[[3]]["pixel_values"], noisy[[1, 3]]["pixel_values"][1:]
    assert torch.equal(once, again) and not torch.equal(once, read[[3]]["pixel_values"])
    assert read.fingerprint() == rows.images(rows.train, mean_colour, 3).fingerprint()


def test_a_broken_image_is_named(folder):
    (folder / "cat" / "1.png").write_bytes(b"no image")
    rows = load_images(str(folder))
    with pytest.raises(DataError, match=r"cat/1\.png: not a readable image"):
        rows.images(rows.train, mean_colour, 3)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nothing", "no such file or folder"),
        ("data/cat", "make one folder for each class"),
        ("data/cat/0.png", "a .png file"),
    ],
)
def test_what_is_no_data_is_said_in_one_line(folder, path, problem):
    with pytest.raises(DataError, match=problem) as error:
        load_images(str(folder.parent / path))
    assert "\n" not in str(error.value)
