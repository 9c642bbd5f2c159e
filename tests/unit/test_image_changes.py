"""Crops, erasing and mixing: drawn by the generator, and what their names say."""

from __future__ import annotations

import pytest
import torch

from stillhouse.data.crops import mix_images, random_erasing, random_resized_crop
from stillhouse.metrics.probe import linear_probe


def batch(count: int = 6, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.rand(count, 3, size, size, generator=generator),
        "labels": torch.arange(count) % 4,
    }


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("change", [random_resized_crop(), random_erasing(0.5), mix_images(4)])
def test_the_generator_decides(change):
    one, two, other = (change(batch(), seeded(seed))["pixel_values"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (6, 3, 8, 8)


def test_a_crop_of_everything_is_the_image():
    whole = random_resized_crop(1.0, 1.0, aspect=1.0)(batch(), seeded())["pixel_values"]
    torch.testing.assert_close(whole, batch()["pixel_values"], atol=1e-5, rtol=1e-5)


def test_a_crop_shows_a_part_of_the_right_size():
    """On a ramp from 0 to 1, a crop's span is its share of the side."""
    ramp = torch.linspace(0, 1, 64).expand(200, 1, 64, 64).contiguous()
    seen = random_resized_crop(0.25, 0.25, aspect=1.0)({"pixel_values": ramp}, seeded())["pixel_values"]
    spans = seen.amax((1, 2, 3)) - seen.amin((1, 2, 3))
    torch.testing.assert_close(spans, torch.full((200,), 0.5), atol=0.03, rtol=0)
    assert seen.amin() < 0.05 and seen.amax() > 0.95 and seen[:, 0, :, 0].std() > 0.05  # from everywhere


def test_erasing_leaves_a_share_of_the_images_alone():
    for share, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 60, 140)):
        before = {"pixel_values": torch.zeros(400, 1, 16, 16)}
        after = random_erasing(share)(before, seeded())["pixel_values"]
        assert low <= int((after != 0).flatten(1).any(1).sum()) <= high
    area = (random_erasing(1.0)(before, seeded())["pixel_values"] != 0).float().mean((1, 2, 3))
    assert area.min() > 0 and area.max() < 0.45


def test_mixing_labels_as_pixels():
    change = mix_images(4, mixup=1.0, cutmix=0.0, smoothing=0.0)
    made = change(batch(), seeded())
    soft, before = made["soft_labels"], batch()["pixel_values"]
    share = float(soft[0, 0])  # labels 0 and 1 meet
    assert 0 < share < 1 and float(soft[0, 1]) == pytest.approx(1 - share)
    torch.testing.assert_close(made["pixel_values"], share * before + (1 - share) * before.flip(0))


def test_pasting_labels_by_area():
    change = mix_images(4, mixup=0.0, cutmix=1.0, smoothing=0.0)
    for seed in range(8):
        made = change(batch(), seeded(seed))
        pasted = (made["pixel_values"] != batch()["pixel_values"]).any(1).float().mean((1, 2))
        assert float(made["soft_labels"][0, 1]) == pytest.approx(float(pasted[0]), abs=1e-6)
        both = torch.stack([batch()["pixel_values"], batch()["pixel_values"].flip(0)])
        assert (made["pixel_values"] == both).any(0).all()


def test_nothing_to_mix():
    made = mix_images(4, mixup=0.0, cutmix=0.0, smoothing=0.1)(batch(), seeded())
    assert torch.equal(made["pixel_values"], batch()["pixel_values"])
    assert made["soft_labels"][0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])


def test_a_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (400,), generator=generator)
    telling = torch.nn.functional.one_hot(labels, 3) * 50.0 + torch.randn(400, 3, generator=generator)
    noise = torch.randn(400, 3, generator=generator)
    half = slice(0, 200), slice(200, 400)
    assert linear_probe(telling[half[0]], labels[half[0]], telling[half[1]], labels[half[1]]) == 1.0
    assert linear_probe(noise[half[0]], labels[half[0]], noise[half[1]], labels[half[1]]) < 0.5
    constant = torch.cat([telling, torch.ones(400, 1)], 1)  # a feature that never changes does no harm
    assert linear_probe(constant[half[0]], labels[half[0]], constant[half[1]], labels[half[1]]) == 1.0
