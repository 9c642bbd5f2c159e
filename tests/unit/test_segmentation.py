"""The promptable segmentation task: generated shapes, the user's pictures, masks and how they are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.data.segments import Fit, decode_rle, load_segments
from stillhouse.data.shapes import KINDS, Shapes, described
from stillhouse.metrics.segmentation import MeanIoU, mask_iou
from stillhouse.models import sam
from stillhouse.objectives.segmentation import MaskLoss
from stillhouse.tasks.segmentation import DemoTeacher, chunks, collate_prompted, masks_of, measure, with_truth
from stillhouse.tasks.segmentation_pictures import draw_masks
from stillhouse.workflow import run_system

TINY = DemoTeacher(image_size=16, hidden_size=8, layers=1, heads=2, window=0, global_layers=(0,), embedding=16)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_an_item_depends_on_the_seed_and_its_number_only():
    some, more = Shapes(3, seed=4), Shapes(9, seed=4)
    more[8], more[0]
    for name, value in some[2].items():
        assert torch.equal(value, more[2][name])
    assert not torch.equal(some[0]["image"], some[1]["image"])
    assert not torch.equal(some[0]["image"], Shapes(1, seed=5)[0]["image"])
    assert len(list(Shapes(4))) == 4  # iteration ends


def test_what_is_said_of_a_shape_is_so():
    for item in Shapes(20, size=40, objects=3):
        image, masks = item["image"], item["masks"]
        assert image.shape == (3, 40, 40) and image.min() >= 0 and image.max() <= 1
        assert masks.shape == (3, 40, 40) and masks.sum(0).max() <= 1  # nothing is in two places
        assert masks.flatten(1).sum(1).min() >= 0.015 * 1600
        for mask, box, point, keypoints in zip(
            masks, item["boxes"].int().tolist(), item["points"].int().tolist(), item["keypoints"].int(), strict=True
        ):
            left, top, right, bottom = box
            assert mask[top : bottom + 1, left : right + 1].sum() == mask.sum()
            assert mask[top].any() and mask[bottom].any() and mask[:, left].any() and mask[:, right].any()
            assert mask[point[1], point[0]]
            assert all(mask[y, x] for x, y in keypoints.tolist())
            assert [keypoints[0, 1], keypoints[1, 0], keypoints[2, 1], keypoints[3, 0]] == [top, right, bottom, left]


def test_the_point_lies_deepest():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, :, 0] = True  # a thin line, and a block
    mask[0, 2:7, 4:9] = True
    assert described(mask)["points"].tolist() == [[6.0, 4.0]]


def test_every_kind_is_drawn():
    kinds = torch.cat([item["kinds"] for item in Shapes(40)])
    assert set(kinds.tolist()) == set(range(len(KINDS)))
    u = torch.tensor([0.0, 0.8, 0.9])
    inside = {name: test(u, torch.tensor([0.0, 0.8, 0.0])).tolist() for name, test in KINDS.items()}
    assert inside["disk"] == [True, False, True] and inside["square"] == [True, True, False]
    assert inside["cross"] == [True, False, True]


# -- comparing --------------------------------------------------------------------------------------------------------


def test_intersection_over_union():
    a, b = torch.zeros(3, 2, 4, dtype=torch.bool), torch.zeros(3, 2, 4, dtype=torch.bool)
    a[0, 0], b[0, :, :2] = True, True  # 4 and 4, 2 in common
    a[1, 0, 0] = True
    assert mask_iou(a, b).tolist() == pytest.approx([2 / 6, 0, 1])
    mean = MeanIoU()
    mean.add(a[:1], b[:1])
    mean.add(a[1:], b[1:])
    assert mean.value == pytest.approx((2 / 6 + 0 + 1) / 3) and mean.count == 3
    with pytest.raises(ValueError, match="do not compare"):
        mask_iou(a, b[:, :1])


def test_the_mask_loss_of_a_perfect_and_of_a_wrong_answer():
    truth = Shapes(2, size=8, objects=2)
    masks = torch.stack([item["masks"] for item in truth])

    def loss(logits: torch.Tensor, guess: float) -> float:
        term = MaskLoss.__new__(MaskLoss)
        torch.nn.Module.__init__(term)
        term.target = "masks"
        guesses = torch.full((2, 2, 1), guess)
        return term.compute(masks=logits[:, :, None], guesses=guesses, batch={"masks": masks}).item()

    right = (masks.float() * 2 - 1) * 100
    assert loss(right, 1.0) == pytest.approx(0, abs=1e-5)
    assert loss(right, 0.5) == pytest.approx(0.25, abs=1e-5)
    dice = 1 - 1 / 65  # nothing in common of 64 pixels in all
    assert loss(-right, 0.0) == pytest.approx(100 + dice, rel=1e-4)


def test_prompts_alike_are_measured_together():
    items: list[dict[str, torch.Tensor]] = [
        {"image": torch.zeros(1), "masks": torch.zeros(k, 1, 1)} for k in (2, 2, 2, 1, 2)
    ]
    assert [chunk["masks"].shape[:2] for chunk in chunks(items, most=2)] == [(2, 2), (1, 2), (1, 1), (1, 2)]


def test_measuring_against_loops():
    model, other = (sam.new_sam(TINY.config(), seed=seed) for seed in (0, 1))
    items = list(Shapes(5, size=16))
    found = measure(model, items, reference=other)
    point, box, agreement, squares = [], [], [], []
    for item in items:
        embedding = model.get_image_embeddings(item["image"][None])
        for k in range(2):
            mask = masks_of(model, embedding, points=item["points"][None, k : k + 1])[0, 0]
            there = other.get_image_embeddings(item["image"][None])
            theirs = masks_of(other, there, points=item["points"][None, k : k + 1])[0, 0]
            boxed = masks_of(model, embedding, boxes=item["boxes"][None, k : k + 1])[0, 0]
            point.append(mask_iou(mask[None], item["masks"][None, k]))
            box.append(mask_iou(boxed[None], item["masks"][None, k]))
            agreement.append(mask_iou(mask[None], theirs[None]))
        squares.append((embedding - there).square().mean())
    assert found["miou"] == pytest.approx(torch.stack(point).mean().item(), abs=1e-3)
    assert found["miou_box"] == pytest.approx(torch.stack(box).mean().item(), abs=1e-3)
    assert found["agreement"] == pytest.approx(torch.stack(agreement).mean().item(), abs=1e-3)
    assert found["embedding_mse"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)


def test_a_coin_decides_between_points_and_boxes():
    items = list(Shapes(2, size=16))
    torch.manual_seed(0)
    seen = [sorted(collate_prompted(items)) for _ in range(20)]
    assert ["input_boxes", "masks", "pixel_values"] in seen and ["input_points", "masks", "pixel_values"] in seen


# -- the user's pictures ----------------------------------------------------------------------------------------------


def encode(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length code, written down from its description."""
    column = mask.T.flatten().astype(int)
    runs, value = [], 0
    for bit in column:
        if bit != value or not runs:
            if not runs and bit == 1:
                runs.append(0)
            runs.append(0)
            value = bit
        runs[-1] += 1
    text = ""
    for place, run in enumerate(runs):
        x = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            low, x = x & 31, x >> 5
            more = not ((x == -1 and low & 16) or (x == 0 and not low & 16))
            text += chr((low | 32 if more else low) + 48)
    return {"size": list(mask.shape), "counts": text}


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths(seed):
    random = np.random.default_rng(seed)
    mask = random.random((37, 53)) < 0.5 if seed % 2 else np.zeros((200, 150), bool)
    if not seed % 2:
        mask[20:170, 30 + seed : 100] = True
        mask[60 + seed :, 120:] = True
    assert np.array_equal(decode_rle(encode(mask)).numpy(), mask)


def test_run_lengths_as_a_list_and_damaged():
    assert decode_rle({"size": [2, 3], "counts": [1, 2, 3]}).int().tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(DataError, match="sum to 5, its size is 2 x 3"):
        decode_rle({"size": [2, 3], "counts": [1, 2, 2]})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures, twice as wide as high; every other one is annotated."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, item in enumerate(Shapes(8, size=32)):
        wide = torch.cat([item["image"], torch.zeros(3, 32, 32)], 2)
        Image.fromarray((wide.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"sa_{number}.png")
        if number % 2:
            notes = [
                {"segmentation": encode(np.pad(mask.numpy(), ((0, 0), (0, 32)))), "point_coords": [point.tolist()]}
                for mask, point in zip(item["masks"], item["points"], strict=True)
            ]
            (folder / f"sa_{number}.json").write_text(json.dumps({"annotations": notes}))
    return folder


def test_pictures_are_fitted_and_padded(pictures):
    found = load_segments(str(pictures), Fit(16))
    assert len(found) == 8
    plain, noted = found[0], found[1]
    assert set(plain) == {"image", "inside"} and plain["image"].shape == (3, 16, 16)
    assert plain["inside"].int().sum() == 16 * 8 and not plain["image"][:, 8:].any() and plain["inside"][7, 15]
    original = Shapes(8, size=32)[1]
    assert noted["masks"].shape == (2, 16, 16) and not noted["masks"][:, 8:].any()
    torch.testing.assert_close(noted["points"], original["points"] / 4)
    share = noted["masks"].sum().item() * 16 / original["masks"].sum().item()
    assert 0.7 < share < 1.3  # a quarter of the side


def test_pictures_that_are_not(pictures, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no pictures in it"):
        load_segments(str(empty), Fit(16))
    with pytest.raises(DataError, match=r"no such folder; did you mean 'pictures'\?"):
        load_segments(str(tmp_path / "pictured"), Fit(16))
    (pictures / "sa_3.json").write_text("{}")
    with pytest.raises(DataError, match=r"sa_3.json: no annotations in SA-1B's format"):
        load_segments(str(pictures), Fit(16))[3]
    (pictures / "sa_4.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"sa_4.png: not a readable image"):
        load_segments(str(pictures), Fit(16))[4]


def test_without_masks_the_teacher_s_are_the_truth(pictures):
    teacher = sam.new_sam(TINY.config(), seed=0)
    items = load_segments(str(pictures), Fit(16))
    made, kept = with_truth(items[0], teacher), with_truth(items[1], teacher)
    assert kept is not None and torch.equal(kept["masks"], items[1]["masks"])
    assert made["masks"].flatten(1).any(1).all() and not (made["masks"] & ~made["inside"]).any()
    assert measure(teacher, [made])["miou"] == 1.0


def test_slimsam_on_the_user_s_model_and_pictures(pictures, tmp_path):
    sam.new_sam(TINY.config(), seed=0).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "preprocessor_config.json").write_text("{}")
    values = {"teacher": str(tmp_path / "teacher"), "data": str(pictures), "epochs": 1, "trackers": []}
    sizes = {"validation_images": 2, "test_images": 2, "accumulate": 2, "bottleneck_ranking": "local"}
    done = run_system("slimsam", {**values, **sizes}, output=tmp_path / "run", quiet=True)
    assert done.artifacts["student"].metrics["steps"] == 2  # four pictures, two a step
    assert (done.folder / "model" / "preprocessor_config.json").exists()
    student, teacher = (done.artifacts["evaluation"].table().row(name) for name in ("student", "teacher"))
    assert 0 <= student["miou"] <= 1 and student["parameters"] < teacher["parameters"]
    with pytest.raises(DataError, match="8 images, of which 100 are held out"):
        run_system("slimsam", values, output=tmp_path / "run2", quiet=True)
    with pytest.raises(ConfigError, match="pass your own teacher"):
        run_system("slimsam", {"data": str(pictures)}, output=tmp_path / "run3", quiet=True)


def test_a_picture_of_masks():
    items = list(Shapes(2, size=16))
    shown = [(item["image"], item["masks"], item["points"]) for item in items]
    one, two = (draw_masks(shown, {"model <a>": [item["masks"] for item in items]}) for _ in range(2))
    assert one == two and one.count("<image") == 4 and "model &lt;a&gt;" in one
