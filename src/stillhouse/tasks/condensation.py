"""The image condensation task: a small data set in place of a large one, measured by what networks learn from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import OptimizerFactory, Player, sgd
from stillhouse.core.run import Run
from stillhouse.core.schedule import step
from stillhouse.core.source import Source
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.condensation.dsa import Kind, augment
from stillhouse.data.condensation.synthetic import SyntheticImages, images_per_class, to_dataset
from stillhouse.data.condensation.zca import ZCA
from stillhouse.data.images import Images, digits, load_images
from stillhouse.data.sources import Augmented, Batches
from stillhouse.models.convnet import MLP, ConvNet
from stillhouse.models.image_classifier import (
    image_processor,
    new_image_classifier,
    pixels_of,
    read_image_config,
    with_classes,
)
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.trajectory import (
    Recorded,
    accumulated_error,
    amplification,
    sharpness,
    shown_from,
)
from stillhouse.tasks.image_data import held_out
from stillhouse.tasks.pictures import sample_picture

DEMO = "demo"
TRAJECTORY = "trajectory.safetensors"


@dataclass(kw_only=True)
class CondensationSystem(System):
    """Fields of every system that makes an image data set small."""

    data: Annotated[str, "folder with a folder of images per class, .parquet file, hub data set id, or 'demo'"] = DEMO
    split: Annotated[str, "split that is condensed"] = "train"
    test_split: Annotated[str | None, "split that is measured on; found by itself by default"] = None
    test: Annotated[float, "share of the images measured on where the data has no split for it", Gt(0), Lt(1)] = 0.2
    image_size: Annotated[int | None, "images are resized to this", Ge(4)] = 32
    channels: Annotated[int, "1 grey, 3 colour", Ge(1)] = 3
    whiten: Annotated[bool, "ZCA-whiten the images (the paper: on CIFAR)"] = True
    network: Annotated[
        str, "convnet, mlp, or new:DIRECTORY: an image classifier's architecture, without batch normalisation"
    ] = "convnet"
    width: Annotated[int, "of the convnet's or mlp's layers", Ge(1)] = 128
    depth: Annotated[int, "of the convnet or mlp", Ge(1)] = 3
    per_class: Annotated[int, "condensed images in each class", Ge(1)] = 10
    augmentation: Annotated[tuple[Kind, ...], "of condensed images, alike within a step (DSA); none in the demo"] = (
        "color",
        "crop",
        "cutout",
        "flip",
        "scale",
        "rotate",
    )
    networks: Annotated[int, "fresh networks trained on every set that is measured", Ge(1)] = 5
    network_steps: Annotated[int, "optimizer steps of each", Ge(1)] = 1000
    network_batch: Annotated[int, "images in their batches", Ge(1)] = 256
    network_lr: Annotated[float, "their learning rate on real images; on condensed ones it is learnt", Gt(0)] = 0.01

    demo: ClassVar[dict[str, Any]] = {
        "whiten": False,
        "network": "mlp",
        "width": 64,
        "depth": 1,
        "per_class": 1,
        "augmentation": (),
        "network_steps": 300,
        "network_lr": 0.1,
    }

    def is_demo(self) -> bool:
        return self.__dict__["data"] == DEMO


@dataclass
class CondensationTask:
    """What a system that condenses images works with."""

    system: CondensationSystem
    run: Run
    images: Images
    test_images: Images
    build: Callable[[int], nn.Module]  # an untrained network from a seed

    @staticmethod
    def prepare(system: CondensationSystem, run: Run) -> CondensationTask:
        """Read the images (decoded once, kept in memory), and find out how networks are made."""
        train, test = (digits("train"), digits("test")) if system.data == DEMO else _user_images(system)
        if system.whiten:
            zca = ZCA.fit(_in_memory(train))
            train, test = (replace(part, pixels=zca(_in_memory(part))) for part in (train, test))
        return CondensationTask(system, run, train, test, _builder(system, train))

    # -- experts ----------------------------------------------------------------------------------------------------

    def expert(
        self,
        objective: Callable[[Observed], Objective],
        name: str,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        seed: int,
    ) -> Train:
        """A stage that trains a network by plain SGD and leaves its weights before the first and after every epoch."""
        model = self.build(seed)
        observed = Observed(model, name=name)
        source = Batches(self.images, batch_size, seed=seed, gather=True)
        recorded = Recorded(objective(observed), model, every=len(source), count=epochs)
        player = Player(name, observed, recorded, optimizer=sgd(lr, momentum=0.0))

        def save(trained: nn.Module, folder: Path) -> None:
            save_file({"points": recorded.finished(trained)}, folder / TRAJECTORY)

        return Train(name, player, source=source, steps=epochs * len(source), save=save)

    @staticmethod
    def points(artifact: Artifact, first: int = 0, last: int | None = None) -> Tensor:
        """Recorded weights (E, P) of an expert, only those asked for."""
        with safe_open(artifact.path / TRAJECTORY, framework="pt") as file:
            return file.get_slice("points")[first:last]

    def segment(
        self, experts: Sequence[Artifact], generator: torch.Generator, *, max_start: int, epochs: int
    ) -> dict[str, Tensor]:
        """A batch for `TrajectoryMatching`: a random expert, from a random epoch on."""
        expert = experts[int(torch.randint(len(experts), (), generator=generator))]
        first = int(torch.randint(max_start + 1, (), generator=generator))
        points = self.points(expert, first, first + epochs + 1)
        seed = torch.randint(2**31, (), generator=generator)
        return {"start": points[0], "target": points[-1], "seed": seed}

    def condensed_set(self, learnt: Artifact, real: Images, context: Context) -> tuple[Any, dict[str, Any]]:
        """The learnt images as a data set, ``step_size.json``, and a picture of them beside those they began as."""
        assert isinstance(real.pixels, Tensor)
        held = learnt.load_into(SyntheticImages(real.pixels, real.labels, step_size=0.0))
        assert isinstance(held, SyntheticImages)
        rate = float(held.step_size.detach())
        if rate <= 0:
            raise ModelError(f"the learnt step size became {rate:g}; lower step_size_lr")
        context.results |= {"images": len(held.labels), "step_size": rate}
        data = to_dataset(held.pixels.detach(), held.labels, self.images.classes)
        picture = {"real images": _stretched(real.pixels), "condensed": _stretched(held.pixels.detach())}
        side = math.ceil(len(held.labels) ** 0.5) if len(held.labels) < 64 else 8
        return data, {"step_size.json": rate, "images.svg": sample_picture(picture, side=side)}

    # -- measuring --------------------------------------------------------------------------------------------------

    def real_subset(self, *, seed: int) -> Images:
        """As many real images of each class as the condensed set has."""
        try:
            return self.images.select(images_per_class(self.images, self.system.per_class, seed=seed))
        except ValueError as error:
            raise DataError(f"data={self.system.data!r}: {error}; lower per_class") from error

    def train_on(self, name: str, images: Images, *, lr: float, number: int) -> Train:
        """A stage that trains a fresh network on ``images``: SGD, momentum 0.9, a tenth of the rate from half-way."""
        system = self.system
        student = Observed(self.build(10_000 + 100 * system.seed + number), name=name)
        player = Player(
            name,
            student,
            CrossEntropy(student.output()),
            optimizer=sgd(lr, momentum=0.9, weight_decay=5e-4),
            lr=step((1.0, 0.1), at=(0.5,)),
        )
        source: Source = Batches(images, system.network_batch, seed=system.seed + number, gather=True)
        if system.augmentation:
            source = Augmented(source, partial(_augmented, system.augmentation), seed=system.seed + number)
        return Train(name, player, source=source, steps=system.network_steps)

    def networks(
        self, sets: Mapping[str, tuple[Images, float]]
    ) -> Generator[Stage, Artifact, dict[str, list[Artifact]]]:
        """The stages that train fresh networks on every set: ``name -> (images, learning rate)``."""
        trained: dict[str, list[Artifact]] = {name: [] for name in sets}
        for name, (images, lr) in sets.items():
            for number in range(self.system.networks):
                trained[name].append((yield self.train_on(f"{name}-{number}", images, lr=lr, number=number)))
        return trained

    @torch.no_grad()
    def accuracy(self, artifact: Artifact) -> float:
        """On the test images, of a network that `train_on` left."""
        model = artifact.load_into(self.build(0)).to(self.run.fabric.device).eval()
        right = 0
        for start in range(0, len(self.test_images), 512):
            batch = self.test_images[range(start, min(start + 512, len(self.test_images)))]
            logits = model(self.run.fabric.to_device(batch["pixel_values"])).cpu()
            right += int((logits.argmax(-1) == batch["labels"]).sum())
        return right / len(self.test_images)

    def trajectory_errors(
        self,
        experts: Sequence[Artifact],
        images: Images,
        rate: float,
        *,
        steps: int,
        epochs: int,
        last: int,
        rho: float,
        size: float = 0.05,
        draws: int = 4,
        most: int = 8,
    ) -> dict[str, float]:
        """How students err on the learnt images, and how sharp the experts' ends are; means over ``most`` experts.

        Args:
            steps, epochs: a segment: of the student, for so many epochs of the expert.
            last: epoch up to which students follow.
            size: norm of the random deviation whose growth is measured, as a share of the weights' norm.
        """
        model = self.build(0).requires_grad_(False).eval()
        pixels, real = _in_memory(images), _in_memory(self.images)
        shown = shown_from(pixels, images.labels)
        rows = []
        for number, expert in enumerate(experts[:most]):
            points = self.points(expert)
            middle = points[last // 2]
            grown = amplification(model, middle, shown, rate, steps=steps, size=size, draws=draws, seed=number)
            rows.append(
                {
                    "accumulated_error": accumulated_error(
                        model, points, shown, rate, steps=steps, epochs=epochs, last=last
                    ),
                    "amplification": grown,
                    "sharpness": sharpness(model, points[-1], real, self.images.labels, rho=rho),
                }
            )
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def evaluation(
        self,
        sets: Mapping[str, Sequence[Artifact]],
        sizes: Mapping[str, int],
        errors: Callable[[], Mapping[str, float]] = dict,
    ) -> Evaluate:
        """Accuracy of the networks trained on each set, and the ``errors`` of students on the first, if any."""
        return Evaluate("evaluation", partial(self._evaluate, sets, sizes, errors))

    def _evaluate(
        self,
        sets: Mapping[str, Sequence[Artifact]],
        sizes: Mapping[str, int],
        errors: Callable[[], Mapping[str, float]],
        context: Context,
    ) -> Table:
        more: Mapping[str, float] = errors()
        rows = []
        for name, artifacts in sets.items():
            found = torch.tensor([self.accuracy(artifact) for artifact in artifacts], dtype=torch.float64)
            spread = found.std().item() if len(found) > 1 else 0.0
            figures = {"accuracy": found.mean().item(), "spread": spread, "images": sizes[name], **more}
            more = {}
            rows.append({"name": name, **figures})
            context.results |= {f"{name}/{key}": float(value) for key, value in figures.items()}
        shown = [column for column in COLUMNS if any(column.key in row for row in rows)]
        return Table("Fresh networks on test images", shown, rows, [f"{len(self.test_images)} test images."])


def images_and_rate(kind: Literal["sgd", "adam"], lr: float, *, momentum: float, rate_lr: float) -> OptimizerFactory:
    """SGD or Adam on learnt images at ``lr``; what has no dimensions (a step size) is learnt at ``rate_lr``."""

    def build(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        parameters = [parameter for group in groups for parameter in group["params"]]
        split = [
            {"params": [p for p in parameters if p.ndim], "lr": lr},
            {"params": [p for p in parameters if not p.ndim], "lr": rate_lr},
        ]
        return torch.optim.SGD(split, momentum=momentum) if kind == "sgd" else torch.optim.Adam(split)

    return build


COLUMNS = [
    Column("images", "images", ",d", None, "in the set they were trained on"),
    Column("accuracy", "accuracy", ".1%", "higher", "mean over fresh networks"),
    Column("spread", "spread", ".1%", None, "standard deviation over the networks"),
    Column("accumulated_error", "accumulated error", ".3f", "lower", "distance to the expert's end over all segments"),
    Column("amplification", "amplification", ".3f", "lower", "growth of a deviation over one segment"),
    Column("sharpness", "sharpness", ".4f", "lower", "rise of the experts' loss at the worst small step"),
]


class _Logits(nn.Module):
    """A classifier of transformers whose forward gives logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _augmented(kinds: Sequence[Kind], batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**batch, "pixel_values": augment(batch["pixel_values"], kinds, generator)}


def _stretched(images: Tensor) -> Tensor:
    """Images of any range in [-1, 1]."""
    low, high = images.min(), images.max()
    return (images - low) / (high - low).clamp(min=1e-6) * 2 - 1


def _in_memory(images: Images) -> Tensor:
    if not isinstance(images.pixels, Tensor):
        raise DataError(f"{images.name}: too many images to condense in memory; lower image_size or take fewer")
    return images.pixels


def _user_images(system: CondensationSystem) -> tuple[Images, Images]:
    rows = load_images(system.data, split=system.split, test_split=system.test_split)
    processor = image_processor(None, image_size=system.image_size, channels=system.channels)
    read = partial(rows.images, process=pixels_of(processor), channels=system.channels)
    if rows.test is not None:
        train, test = read(rows.train), read(rows.test)
    else:
        tested, trained = held_out(len(rows.train), (system.test,), name=system.data)
        train, test = read(rows.train.select(trained)), read(rows.train.select(tested))
    return replace(train, pixels=_in_memory(train)), replace(test, pixels=_in_memory(test))


def _builder(system: CondensationSystem, images: Images) -> Callable[[int], nn.Module]:
    """What makes an untrained network from a seed; no global random state moves."""
    shape, classes = images.shape, len(images.classes)
    config: Any = None
    if system.network.startswith("new:"):
        config = with_classes(
            read_image_config(system.network.removeprefix("new:")),
            images.classes,
            num_channels=shape[0],
            image_size=shape[-1],
        )
    elif system.network not in ("convnet", "mlp"):
        raise ConfigError(f"network={system.network!r} is not allowed; expected convnet, mlp or new:DIRECTORY")
    if system.network == "convnet" and min(shape[1:]) < 2 ** (system.depth - 1):
        raise ConfigError(f"depth={system.depth}: images of {shape[1]} x {shape[2]} cannot be halved so often")

    def build(seed: int) -> nn.Module:
        if config is not None:
            model = _Logits(new_image_classifier(config, seed=seed))
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
                raise ModelError(
                    f"network={system.network}: has batch normalisation, whose statistics cannot be unrolled"
                )
            return model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if system.network == "convnet":
                return ConvNet(shape, classes, width=system.width, depth=system.depth)
            return MLP(shape, classes, widths=[system.width] * system.depth)

    return build
