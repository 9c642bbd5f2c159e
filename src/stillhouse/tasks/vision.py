"""The image classification task: teachers, students and images, embedded or the user's own.

`VisionSystem` has the fields that all systems on image classifiers share; `VisionTask.prepare` turns them into a
teacher, a student, batches and measurements. On the embedded task the images are scikit-learn's digits, and a small
teacher is trained on them once and kept in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import OptimizerFactory, Player, adamw, sgd
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, cosine, linear, step
from stillhouse.core.source import Source
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.train import Train
from stillhouse.data.images import (
    Images,
    digits,
    gaussian_noise,
    in_turn,
    random_flip,
    random_shift,
    subset,
    with_label_noise,
    with_noise,
)
from stillhouse.data.sources import Augmented, Batches, Change, passes_in, steps_in
from stillhouse.metrics.classification import ClassificationFigures, compare_classifiers, images_per_second
from stillhouse.models.image_classifier import (
    classifier_from_spec,
    image_processor,
    load_image_classifier,
    new_image_classifier,
    pixels_of,
    plain_processor,
    read_image_config,
    save_classifier,
    with_classes,
)
from stillhouse.models.scaling import parameter_count
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.tasks.image_data import DEMO, ImageSystem, held_out

DEMO_SIZE = 8
EVALUATION_BATCH = 256


@dataclass(kw_only=True)
class VisionSystem(ImageSystem):
    """Fields of every system that distils image classifiers."""

    teacher: Annotated[
        str,
        "directory or hub id of an image classifier; new:NAME: its architecture with random weights, where the teacher "
        "is trained too; 'demo': a small one, trained once on the digits",
    ] = DEMO
    student: Annotated[
        str,
        "directory or hub id; new:NAME: its architecture with random weights; or the teacher's architecture made "
        "smaller: scale:0.25, hidden_sizes=8-16",
    ] = "scale:0.25"
    validation: Annotated[float, "share of the images held out to select by", Gt(0), Lt(1)] = 0.1
    image_size: Annotated[int | None, "images are resized to this; by default what the model asks for", Ge(1)] = None
    train_size: Annotated[int | None, "so many training images only, drawn by the seed", Ge(1)] = None
    label_noise: Annotated[
        float, "share of the training labels replaced by another, drawn by the seed", Ge(0), Le(1)
    ] = 0.0
    noise: Annotated[
        float,
        "standard deviation of Gaussian noise on the pixels: new in every training batch, fixed on held-out images",
        Ge(0),
    ] = 0.0
    shift: Annotated[int, "training images are moved by up to so many pixels", Ge(0)] = 4
    flip: Annotated[bool, "half of the training images are mirrored, anew in every batch"] = True
    batch_size: Annotated[int, "images in a micro-batch, all processes together", Ge(1)] = 128
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 1
    epochs: Annotated[float, "passes over the training images", Gt(0)] = 200.0
    steps: Annotated[int | None, "optimizer steps; by default as many as the epochs need", Ge(1)] = None
    optimizer: Annotated[Literal["sgd", "adamw"], "SGD with momentum, or AdamW"] = "sgd"
    lr: Annotated[float, "peak learning rate", Gt(0)] = 0.1
    lr_schedule: Annotated[
        Literal["step", "cosine", "linear", "constant"], "course of the learning rate; step: a tenth at 1/2 and 3/4"
    ] = "step"
    warmup: Annotated[float, "share of the steps over which the rate rises; not with step", Ge(0), Lt(1)] = 0.0
    momentum: Annotated[float, "of SGD", Ge(0), Lt(1)] = 0.9
    nesterov: Annotated[bool, "look ahead with SGD's momentum"] = True
    weight_decay: Annotated[float, "weight decay", Ge(0)] = 5e-4
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = None
    keep: Annotated[Literal["last", "best"], "weights kept: the last, or those with the lowest selection loss"] = "last"
    baseline: Annotated[bool, "also train the same student on the labels alone, for comparison"] = False
    eval_images: Annotated[int, "selection images looked at during training", Ge(1)] = 2000
    compile: Annotated[bool, "compile the student with torch.compile"] = False
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False

    demo: ClassVar[dict[str, Any]] = {
        "shift": 0,
        "flip": False,
        "batch_size": 64,
        "epochs": 40.0,
        "lr_schedule": "cosine",
        "baseline": True,
    }
    smoke: ClassVar[dict[str, Any]] = {"student": "hidden_sizes=4-8,embedding_size=4", "train_size": 128, "steps": 22}

    def learning_rate(self) -> Schedule:
        """The course of the learning rate, as a factor."""
        if self.lr_schedule == "step":
            return step((1.0, 0.1, 0.01), at=(0.5, 0.75))
        shape = cosine if self.lr_schedule == "cosine" else linear
        return shape(1.0, 1.0 if self.lr_schedule == "constant" else 0.0, warmup=self.warmup)

    def optimizer_factory(self) -> OptimizerFactory:
        """What makes the optimizer."""
        if self.optimizer == "adamw":
            return adamw(self.lr, weight_decay=self.weight_decay)
        nesterov = self.nesterov and self.momentum > 0
        return sgd(self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)


@dataclass
class VisionTask:
    """What a vision system works with, once its fields have been turned into objects.

    ``train`` is what is learnt from (subset and label noise applied), ``selection`` what choices are made by, ``test``
    what is measured on in the end and never chosen by. ``teacher`` is None where the system needs none that is trained
    already; ``teacher_config`` is its architecture all the same.
    """

    system: VisionSystem
    run: Run
    images: Images
    selection: Images
    test: Images
    processor: Any
    teacher: nn.Module | None
    build_teacher: Callable[[int], nn.Module]  # from a seed, which loaded weights ignore
    build_student: Callable[[int], nn.Module]

    @staticmethod
    def prepare(system: VisionSystem, run: Run, *, teacher: bool = True) -> Generator[Stage, Artifact, VisionTask]:
        """Build the task.

        Args:
            teacher: whether the system needs a teacher that is trained already; on the embedded task this then yields
                the stage that trains it. Without, ``teacher=`` says which architecture students are made from.
        """
        name = system.teacher
        scratch = name == DEMO or name.startswith("new:")
        if teacher and name.startswith("new:"):
            raise ConfigError(f"teacher={name}: has random weights, and this system's teacher must know something")
        if teacher and name == DEMO and system.data != DEMO:
            raise ConfigError("teacher=demo is trained on data=demo; for your own data pass your own teacher")
        config = (
            DemoTeacher().config()
            if name == DEMO
            else read_image_config(name.removeprefix("new:"), trust_remote_code=system.trust_remote_code)
        )
        found = _digits() if system.data == DEMO else _user_images(system, config)
        model: nn.Module | None = None
        if scratch:
            config = with_classes(config, found.train.classes, **found.fields)
            if teacher:
                model = yield from _demo_teacher(system.noise)
        else:
            model = load_image_classifier(name, trust_remote_code=system.trust_remote_code)
            found = found.with_order_of(name, model)
        train = found.train if system.train_size is None else subset(found.train, system.train_size, seed=system.seed)
        if system.label_noise:
            train = with_label_noise(train, system.label_noise, seed=system.seed)
        selection, test = found.selection, found.test
        if system.noise:  # the same for all models, whatever the seed
            selection, test = with_noise(selection, system.noise, seed=1), with_noise(test, system.noise, seed=2)
        build_teacher = _builder(system, None if scratch else name, config)
        build_student = _student_builder(system, config, found)
        return VisionTask(system, run, train, selection, test, found.processor, model, build_teacher, build_student)

    def new_student(self, number: int = 0) -> nn.Module:
        """A student with random weights, other ones for each number, or with those of the directory it comes from."""
        return self.build_student(self.system.seed + number)

    def new_teacher(self) -> nn.Module:
        """A model of the teacher's architecture, to be trained: with the teacher's weights, or with random ones."""
        return self.build_teacher(self.system.seed + 1_000)  # not those of a student of the same shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self.images.classes

    def steps_of(self, epochs: float, images: Images | None = None) -> int:
        """Optimizer steps in so many passes over the training images (or over ``images``)."""
        return steps_in(epochs, len(self.images if images is None else images), **self._batching())

    def passes_of(self, steps: int) -> int:
        """Passes over the training images in so many optimizer steps."""
        return passes_in(steps, len(self.images), **self._batching())

    def _batching(self) -> dict[str, int]:
        return {"batch_size": self.system.batch_size, "accumulate": self.system.accumulate}

    def steps(self) -> int:
        """Optimizer steps of the run: the field, or as many as the epochs need."""
        return self.system.steps or self.steps_of(self.system.epochs)

    def source(self, images: Images | None = None, *, seed: int | None = None) -> Source:
        """Batches of the training images (or of ``images``), shifted, mirrored and made noisy as the fields say."""
        system, chosen = self.system, self.images if images is None else images
        seed = system.seed if seed is None else seed
        batches = Batches(chosen, system.batch_size, seed=seed, gather=True)
        changes: list[Change] = [random_shift(system.shift)] if system.shift else []
        changes += [random_flip] if system.flip else []
        changes += [gaussian_noise(system.noise)] if system.noise else []
        return Augmented(batches, in_turn(changes), seed=seed) if changes else batches

    def observed_teacher(self) -> Observed:
        """The frozen teacher."""
        if self.teacher is None:
            raise ConfigError("this task was prepared without a trained teacher")
        return Observed(self.teacher, frozen=True, name="teacher")

    def cross_entropy(self, student: Observed) -> Objective:
        """The objective of a student that learns from the labels alone."""
        return CrossEntropy(student.output("logits"))

    def player(self, name: str, model: Observed, objective: Objective) -> Player:
        """A player with the optimizer, the learning rate and the clipping that the fields say."""
        system = self.system
        optimizer = system.optimizer_factory()
        return Player(name, model, objective, optimizer=optimizer, lr=system.learning_rate(), clip=system.clip)

    def train(
        self,
        name: str,
        objective: Callable[[Observed], Objective],
        *,
        model: nn.Module | None = None,
        images: Images | None = None,
        steps: int | None = None,
    ) -> Train:
        """A stage that trains a new student (or ``model``); ``objective`` gets the observed student."""
        student = Observed(self.new_student() if model is None else model, name=name)
        return self.stage(name, [self.player(name, student, objective(student))], images=images, steps=steps)

    def stage(
        self,
        name: str,
        players: list[Player],
        *,
        images: Images | None = None,
        steps: int | None = None,
        save: Saver | None = None,
        together: bool = False,
    ) -> Train:
        """A stage on the training images for these players; the first one's model is looked at and is the result."""
        system = self.system
        return Train(
            name,
            players,
            source=self.source(images),
            steps=steps or self.steps(),
            accumulate=system.accumulate,
            together=together,
            evaluate=partial(self.selection_figures, players[0].trained[0].module),
            best="val_loss" if system.keep == "best" else None,
            save=save or self.save,
            compile=system.compile,
        )

    def together(self, name: str, players: list[Player]) -> Generator[Stage, Artifact, dict[str, Artifact | Path]]:
        """The stage that trains all these players at once; returns the model of each, by its player's name.

        The first one's is the stage's result; the others lie within it, in folders of their own.
        """
        first, *others = players

        def save(model: Any, folder: Path) -> None:
            self.save(model, folder)
            for player in others:
                self.save(player.trained[0].module, folder / player.name)

        trained = yield self.stage(name, players, save=save, together=True)
        return {first.name: trained, **{player.name: trained.path / player.name for player in others}}

    def baseline(self) -> Train:
        """The same student on the labels alone: what distillation has to beat."""
        return self.train("baseline", self.cross_entropy)

    def save(self, model: Any, folder: Path) -> None:
        """Write a model and its image processor the way ``transformers`` loads them."""
        save_classifier(model, folder, processor=self.processor)

    def load(self, artifact: Artifact | Path) -> nn.Module:
        """The model a stage left."""
        folder = artifact.path if isinstance(artifact, Artifact) else artifact
        model = load_image_classifier(str(folder), trust_remote_code=self.system.trust_remote_code)
        return model.to(self.run.fabric.device).eval()

    def batches(self, images: Images, most: int | None = None) -> Iterator[Batch]:
        """Images in batches, in order, on the run's device."""
        count = min(len(images), most or len(images))
        for start in range(0, count, EVALUATION_BATCH):
            rows = images[list(range(start, min(count, start + EVALUATION_BATCH)))]
            yield self.run.fabric.to_device(rows)

    def figures(self, model: nn.Module, images: Images, most: int | None = None) -> ClassificationFigures:
        """Figures of one model, which should be in evaluation mode, on some images."""
        return compare_classifiers({"model": model}, self.batches(images, most))["model"]

    def selection_figures(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the selection images: the curve shown during training."""
        found = self.figures(model, self.selection, self.system.eval_images)
        return {"val_loss": found.nll, "accuracy": found.accuracy}

    def evaluation(self, models: Mapping[str, Artifact | Path]) -> Evaluate:
        """The final table: the teacher, if there is a trained one, beside the models that were trained."""
        return Evaluate("evaluation", partial(self._evaluate, models))

    def _evaluate(self, artifacts: Mapping[str, Artifact | Path], context: Context) -> tuple[Table, dict[str, Any]]:
        models: dict[str, nn.Module] = {}
        if self.teacher is not None:
            models["teacher"] = self.teacher.to(self.run.fabric.device).eval()
        models |= {name: self.load(artifact) for name, artifact in artifacts.items()}
        reference = "teacher" if "teacher" in models else None
        found = compare_classifiers(models, self.batches(self.test), reference=reference)
        batch = next(self.batches(self.test, 64))
        rows = []
        for name, figures in found.items():
            row: dict[str, Any] = {
                "name": name,
                "parameters": parameter_count(models[name]),
                "accuracy": figures.accuracy,
                "nll": figures.nll,
                "ece": figures.ece,
                "aurc": figures.aurc,
                "entropy": figures.entropy,
                "images_per_second": images_per_second(models[name], batch),
            }
            if reference:
                row |= {"agreement": figures.agreement, "kl": figures.kl}
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        note = f"{len(self.test):,} images that nothing was trained on or chosen by ({self.images.name})."
        files = {"reliability.json": {name: figures.reliability.to_json() for name, figures in found.items()}}
        shown = [column for column in COLUMNS if reference or column.key not in ("agreement", "kl")]
        return Table("Test images", shown, rows, [note]), files


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("accuracy", "accuracy", ".1%", "higher", "share of the images whose most likely class is the right one"),
    Column("nll", "NLL", ".3f", "lower", "mean negative log-likelihood of the right class, nats"),
    Column("ece", "ECE", ".3f", "lower", "expected calibration error of the most likely class, 15 bins"),
    Column("aurc", "AURC", ".4f", "lower", "area under the risk-coverage curve: error rate of the most confident"),
    Column("agreement", "agreement", ".1%", "higher", "how often the most likely class is the teacher's"),
    Column("kl", "KL to teacher", ".3f", "lower", "mean KL(teacher || model), nats"),
    Column("images_per_second", "images/s", ",.0f", "higher", "images classified per second, on this machine"),
]


# -- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The three parts of a data set, how its images are prepared, and what that says of a config."""

    train: Images
    selection: Images
    test: Images
    processor: Any
    fields: Mapping[str, Any]

    def with_order_of(self, name: str, model: Any) -> _Found:
        """The same with the labels numbered as the model does, where it names the same classes in another order."""
        known = [str(model.config.id2label[number]) for number in sorted(model.config.id2label)]
        classes = self.train.classes
        if len(known) != len(classes):
            raise ModelError(
                f"{name}: tells {len(known)} classes apart, {self.train.name} has {len(classes)}; give a model that "
                "was trained for these classes"
            )
        if known == list(classes) or set(known) != set(classes):
            return self
        place = torch.tensor([known.index(one) for one in classes])

        def renumbered(images: Images) -> Images:
            return replace(images, labels=place[images.labels], classes=tuple(known))

        train, selection, test = map(renumbered, (self.train, self.selection, self.test))
        return replace(self, train=train, selection=selection, test=test)


def _digits() -> _Found:
    processor, fields = plain_processor(DEMO_SIZE), {"num_channels": 1, "image_size": DEMO_SIZE}
    return _Found(digits("train"), digits("selection"), digits("test"), processor, fields)


def _user_images(system: VisionSystem, config: Any) -> _Found:
    rows = system.image_rows()
    named = next((one for one in (system.teacher, system.student) if _is_model(one)), None)
    size = getattr(config, "image_size", None) if system.teacher != DEMO else None
    size = system.image_size or (size if named is None and isinstance(size, int) else None)
    channels = 3 if system.teacher == DEMO else config.num_channels
    name = None if named is None else named.removeprefix("new:").split(",")[0]
    processor = image_processor(name, image_size=size, channels=channels)
    process = pixels_of(processor)
    shares = (system.validation, system.test if rows.test is None else 0.0)
    selected, tested, trained = held_out(len(rows.train), shares, name=system.data)
    read = partial(rows.images, process=process, channels=channels)
    test = rows.test if rows.test is not None else rows.train.select(tested)
    train = read(rows.train.select(trained))
    fields = {"num_channels": channels, "image_size": train.shape[-1]}
    return _Found(train, read(rows.train.select(selected)), read(test), processor, fields)


def _is_model(spec: str) -> bool:
    return spec != DEMO and (spec.startswith("new:") or not _is_sizes(spec))


def _is_sizes(spec: str) -> bool:
    return not spec.startswith("new:") and (spec.startswith("scale:") or "=" in spec)


def _builder(system: VisionSystem, name: str | None, config: Any) -> Callable[[int], nn.Module]:
    """What loads the model ``name``, or, without a name, makes one of ``config`` from a seed."""

    def build(seed: int) -> nn.Module:
        if name is not None:
            return load_image_classifier(name, trust_remote_code=system.trust_remote_code)
        return new_image_classifier(config, seed=seed)

    return build


def _student_builder(system: VisionSystem, reference: Any, found: _Found) -> Callable[[int], nn.Module]:
    """How to make a new student for these images; ``reference`` is the config that sizes are relative to."""
    spec, classes = system.student, found.train.classes
    if not _is_model(spec):
        config = classifier_from_spec(spec, reference)
    elif spec.startswith("new:"):
        name, _, sizes = spec.removeprefix("new:").partition(",")
        config = read_image_config(name, trust_remote_code=system.trust_remote_code)
        config = with_classes(config, classes, **found.fields)
        config = classifier_from_spec(sizes, config) if sizes else config
    else:
        load = _builder(system, spec, None)
        found.with_order_of(spec, load(0))
        return load
    return _builder(system, None, with_classes(config, classes))


# -- the embedded teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoTeacher:
    """How the embedded teacher is made; part of its fingerprint in the cache."""

    hidden_sizes: tuple[int, ...] = (32, 64)
    depths: tuple[int, ...] = (1, 1)
    noise: float = 0.0
    batch_size: int = 64
    epochs: float = 30.0
    lr: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0

    def config(self) -> Any:
        """A ResNet for 8 x 8 grey images of ten classes."""
        from transformers import ResNetConfig

        config = ResNetConfig(
            num_channels=1,
            embedding_size=self.hidden_sizes[0],
            hidden_sizes=list(self.hidden_sizes),
            depths=list(self.depths),
            layer_type="basic",
        )
        return with_classes(config, tuple(map(str, range(10))))


def _demo_teacher(noise: float) -> Generator[Stage, Artifact, nn.Module]:
    recipe = DemoTeacher(noise=noise)
    images, config = digits("train"), recipe.config()
    cache = {
        **asdict(recipe),
        "data": images.fingerprint(),
        "config": {**config.to_dict(), "transformers_version": None},
    }
    batches = Batches(images, recipe.batch_size, seed=recipe.seed, gather=True)
    source: Source = Augmented(batches, gaussian_noise(noise), seed=recipe.seed) if noise else batches

    def player() -> Player:
        teacher = Observed(new_image_classifier(config, seed=recipe.seed), name="teacher")
        optimizer = sgd(recipe.lr, weight_decay=recipe.weight_decay, nesterov=True)
        objective = CrossEntropy(teacher.output("logits"))
        return Player("teacher", teacher, objective, optimizer=optimizer, lr=cosine(1.0, 0.0))

    trained = yield Train(
        "teacher",
        player,
        source=source,
        steps=math.ceil(recipe.epochs * len(batches)),
        save=partial(save_classifier, processor=plain_processor(DEMO_SIZE)),
        cache=cache,
    )
    return load_image_classifier(str(trained.path))


# -- a picture ------------------------------------------------------------------------------------------------------


def sample_picture(file: Path, *, count: int = 10, noise: float = 0.35) -> None:
    """Write an SVG with some digits of the embedded task, clean above and noisy below; the same bytes every time."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = {"clean": digits("test"), f"noise={noise:g}": digits("test", noise=noise)}
    with rc_context({"svg.hashsalt": "stillhouse", "svg.fonttype": "none"}):
        figure = Figure(figsize=(count * 0.8, 2.0), layout="constrained")
        axes = figure.subplots(len(shown), count)
        for row, (title, images) in zip(axes, shown.items(), strict=True):
            for number, axis in enumerate(row):
                axis.imshow(images[[number]]["pixel_values"][0, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(title)
        for number, axis in enumerate(axes[0]):
            axis.set_title(images.classes[int(images.labels[number])])
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
