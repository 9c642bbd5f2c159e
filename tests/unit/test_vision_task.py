"""Image classifiers from a line of text or a directory, and the task on the user's own models and images."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from stillhouse import Run
from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.core.stage import Stage
from stillhouse.core.system import Meta
from stillhouse.models.image_classifier import (
    classifier_from_spec,
    load_image_classifier,
    new_image_classifier,
    pixels_of,
    with_classes,
)
from stillhouse.models.scaling import parameter_count
from stillhouse.tasks.vision import VisionSystem, VisionTask, sample_picture

RESNET = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
VIT = ViTConfig(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
)


@dataclass(kw_only=True)
class Alone(VisionSystem):
    """The labels alone."""

    meta = Meta(title="Alone", domain="vision", family="none", granularity="sample", modality="image")

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        task = yield from VisionTask.prepare(self, run)
        student = yield task.train("student", task.cross_entropy)
        yield task.evaluation({"student": student})


def task_of(system: VisionSystem, folder: Path) -> VisionTask:
    """The task of a system that brings its own teacher."""
    stages = VisionTask.prepare(system, Run(folder, quiet=True))
    try:
        next(stages)
    except StopIteration as end:
        return end.value
    raise AssertionError("a stage was asked for")


# -- specifications -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RESNET, VIT])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_scale_is_kept_and_nearly_used_up(config, ratio):
    budget = ratio * parameter_count(new_image_classifier(config, seed=0))
    small = parameter_count(new_image_classifier(classifier_from_spec(f"scale:{ratio}", config), seed=0))
    assert (0.3 if ratio < 0.1 else 0.6) * budget < small <= budget  # widths are whole numbers, in heads for the ViT


def test_sizes_by_name():
    small = classifier_from_spec("hidden_sizes=4-8-12, depths=1-1-1", RESNET)
    assert (small.hidden_sizes, small.depths, small.embedding_size) == ([4, 8, 12], [1, 1, 1], 16)
    assert new_image_classifier(small, seed=0)(torch.zeros(2, 1, 32, 32)).logits.shape[0] == 2
    thin = classifier_from_spec("layers=1,heads=2,hidden_size=8", VIT)
    assert (thin.num_hidden_layers, thin.num_attention_heads, thin.hidden_size) == (1, 2, 8)
    both = classifier_from_spec("scale:0.3,depths=1-1", RESNET)
    assert both.depths == [1, 1] and both.hidden_sizes[0] < 16


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("hiden_sizes=4-8", "did you mean 'hidden_sizes'"),
        ("hidden_sizes=4-x", "'4-x' is not a number"),
        ("scale:2", "above 0 and at most 1"),
        ("scale:0.0001", "at most 4 parameters"),
        ("scale:0.5,scale:0.5", "sets nothing"),
        ("hidden_sizes=4-8-16", "3 hidden_sizes and 2 depths"),
    ],
)
def test_bad_sizes_are_named(spec, problem):
    with pytest.raises(ModelError, match=problem):
        classifier_from_spec(spec, RESNET)


def test_new_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (new_image_classifier(RESNET, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = [model.state_dict()["classifier.1.weight"] for model in (one, again, other)]
    assert torch.equal(pairs[0], pairs[1]) and not torch.equal(pairs[0], pairs[2])


def test_what_is_no_classifier_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="llama is not an image classifier"):
        load_image_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="no weights in it"):
        load_image_classifier(str(tmp_path))


# -- the user's own -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT (classes in another order than the folders'), its processor, and coloured images of two classes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("own")
    names = {0: "red", 1: "blue"}
    config = with_classes(VIT, tuple(names.values()))
    new_image_classifier(config, seed=0).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for colour, rgb in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (folder / "images" / colour).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (24, 20), rgb).save(folder / "images" / colour / f"{number}.png")
    return folder


def fields(own: Path, **more: Any) -> dict[str, Any]:
    return {"teacher": str(own / "vit"), "data": str(own / "images"), "shift": 1, "batch_size": 8, **more}


def test_labels_follow_the_teacher_s_numbers(own, tmp_path):
    task = task_of(Alone.make(**fields(own)), tmp_path)
    assert task.classes == ("red", "blue") and task.images.shape == (3, 16, 16)
    assert (len(task.images), len(task.selection), len(task.test)) == (32, 4, 4)
    for images in (task.images, task.selection, task.test):
        batch = images[list(range(len(images)))]
        red = batch["pixel_values"][:, 0].mean((1, 2)) > 0
        assert torch.equal(red, batch["labels"] == 0)


def test_a_run_on_the_user_s_own_learns_and_is_loaded_by_transformers(own, tmp_path):
    system = Alone.make(**fields(own, student="new:" + str(own / "vit") + ",layers=1", lr=0.02, steps=25, flip=True))
    done = Run(tmp_path, quiet=True).execute(system)
    table = done["evaluation"].table()
    assert [row["name"] for row in table.rows] == ["teacher", "student"]
    assert table.row("student")["accuracy"] == 1.0  # red and blue
    saved = done["student"].path
    model, processor = AutoModelForImageClassification.from_pretrained(saved), AutoImageProcessor.from_pretrained(saved)
    assert isinstance(model, ViTForImageClassification) and model.config.num_hidden_layers == 1
    from PIL import Image

    with Image.open(own / "images" / "blue" / "0.png") as image:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert model.config.id2label[int(model.eval()(pixel_values=pixels).logits.argmax())] == "blue"
    files = json.loads((done["evaluation"].path / "reliability.json").read_text())
    assert files.keys() == {"teacher", "student"}


def test_the_held_out_images_do_not_depend_on_the_seed(own, tmp_path):
    tasks = [task_of(Alone.make(**fields(own, seed=seed, train_size=10)), tmp_path) for seed in (0, 1)]
    assert tasks[0].test.fingerprint() == tasks[1].test.fingerprint()
    assert tasks[0].images.fingerprint() != tasks[1].images.fingerprint()


def test_an_image_size_of_one_s_own(own, tmp_path):
    task = task_of(Alone.make(**fields(own, image_size=8, student="new:" + str(own / "vit"))), tmp_path)
    assert task.images.shape == (3, 8, 8)
    assert task.processor.size["height"] == 8


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"teacher": "demo"}, ConfigError, "pass your own teacher"),
        ({"teacher": "new:{own}/vit"}, ConfigError, "random weights"),
        ({"teacher": "{own}/vot"}, ModelError, "did you mean 'vit'"),
        ({"data": "demo"}, ModelError, "tells 2 classes apart, demo has 10"),
        ({"student": "layers=0"}, ModelError, "must be at least 1"),
        ({"train_size": 1000}, DataError, "it has 32"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(own, tmp_path, changes, error, problem):
    values = fields(own) | {name: str(value).format(own=own) for name, value in changes.items()}
    with pytest.raises(error, match=problem) as raised:
        task_of(Alone.make(**values), tmp_path).new_student()
    assert "\n" not in str(raised.value)


def test_the_processor_gives_what_the_digits_are():
    """What a user does to an image of 16 grey levels is what the embedded images are."""
    from PIL import Image

    from stillhouse.data.images import digits
    from stillhouse.models.image_classifier import plain_processor

    batch = digits("test")[[0, 1]]
    grey = [Image.fromarray((image[0] * 255).round().byte().numpy()) for image in batch["pixel_values"]]
    torch.testing.assert_close(pixels_of(plain_processor(8))(grey), batch["pixel_values"], atol=1 / 255, rtol=0)


def test_the_picture_of_the_task_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        sample_picture(tmp_path / f"{name}.svg", count=3)
    one, two = ((tmp_path / f"{name}.svg").read_bytes() for name in ("one", "two"))
    assert one == two and one.count(b"<image") == 6
