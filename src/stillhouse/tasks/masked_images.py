"""The masked image task: ViTMAE teachers and students, images, and how much of labels their encoders can be read.

`MaskedImageSystem` has the fields that such systems share; `MaskedImageTask.prepare` turns them into a teacher, a
student and batches in which teacher and student see the same patches. On the embedded task the images are
scikit-learn's digits, and a small masked autoencoder is trained on them once and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.train import Train
from stillhouse.data.crops import mix_images, random_erasing, random_resized_crop
from stillhouse.data.images import Images, digits, in_turn, random_flip, subset
from stillhouse.data.sources import Augmented, Batches, Change
from stillhouse.metrics.probe import linear_probe
from stillhouse.models import masked
from stillhouse.models.image_classifier import image_processor, pixels_of, plain_processor
from stillhouse.models.scaling import parameter_count
from stillhouse.objectives.masked import Reconstruction
from stillhouse.objectives.soft_labels import SoftCrossEntropy
from stillhouse.tasks.image_data import DEMO, ImageSystem, held_out

if TYPE_CHECKING:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

LOOK = 256  # images in a batch of a measurement


@dataclass(kw_only=True)
class MaskedImageSystem(ImageSystem):
    """Fields of every system that distils masked autoencoders."""

    teacher: Annotated[
        str, "directory or hub id of a ViTMAEForPreTraining; 'demo': a small one, trained once on the digits"
    ] = DEMO
    student: Annotated[
        str, "directory or hub id of one, or the teacher's architecture with other sizes: hidden_size=384,heads=6"
    ] = "hidden_size=768,layers=12,heads=12"
    mask_ratio: Annotated[float, "share of the patches that is hidden", Gt(0), Lt(1)] = 0.75
    rounding: Annotated[
        masked.Rounding, "how the number of visible patches is rounded; truncate: as transformers does by itself"
    ] = "nearest"
    normalise_pixels: Annotated[bool, "reconstruct patches that are standardised one by one"] = False
    crop: Annotated[bool, "pre-training sees random crops (20 to 100 % of the area)"] = True
    flip: Annotated[bool, "half of the training images are mirrored, anew in every batch"] = True
    batch_size: Annotated[int, "images in a micro-batch, all processes together", Ge(1)] = 1024
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 4
    epochs: Annotated[float, "passes over the images in pre-training", Gt(0)] = 100.0
    steps: Annotated[int | None, "optimizer steps of pre-training; by default as many as the epochs need", Ge(1)] = None
    lr: Annotated[float, "peak learning rate of AdamW (1.5e-4 for every 256 images of a step)", Gt(0)] = 2.4e-3
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.2
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.05
    beta2: Annotated[float, "AdamW's second momentum in pre-training", Gt(0), Lt(1)] = 0.95
    probe_labels: Annotated[int | None, "labelled images that the linear probe learns from; none: all", Ge(10)] = None
    finetune_epochs: Annotated[float, "passes over the labelled images in fine-tuning; 0 leaves it out", Ge(0)] = 100.0
    finetune_steps: Annotated[int | None, "optimizer steps of fine-tuning, instead of the epochs", Ge(1)] = None
    finetune_batch_size: Annotated[int, "images in a batch of fine-tuning", Ge(1)] = 1024
    finetune_lr: Annotated[float, "peak learning rate of fine-tuning (5e-4 for every 256 images)", Gt(0)] = 2e-3
    mixup: Annotated[float, "Beta parameter of mixup in fine-tuning; 0 turns it off", Ge(0)] = 0.8
    cutmix: Annotated[float, "Beta parameter of cutmix in fine-tuning; 0 turns it off", Ge(0)] = 1.0
    erasing: Annotated[float, "share of the images with a rectangle erased, in fine-tuning", Ge(0)] = 0.25

    demo: ClassVar[dict[str, Any]] = {
        "student": "hidden_size=16,layers=2,heads=2",
        "crop": False,
        "flip": False,
        "batch_size": 64,
        "accumulate": 1,
        "epochs": 40.0,
        "warmup": 0.1,
        "probe_labels": 100,
        "finetune_epochs": 20.0,
        "finetune_batch_size": 64,
        "mixup": 0.0,
        "cutmix": 0.0,
        "erasing": 0.0,
    }
    smoke: ClassVar[dict[str, Any]] = {"teacher_steps": 20, "steps": 22, "finetune_steps": 5}

    teacher_steps: Annotated[int, "steps that the embedded teacher is trained for", Ge(1)] = 1500


@dataclass
class MaskedImageTask:
    """What a masked image system works with, once its fields have been turned into objects."""

    system: MaskedImageSystem
    run: Run
    teacher: ViTMAEForPreTraining
    images: Images
    test: Images
    processor: Any
    new_student: Callable[[], ViTMAEForPreTraining]

    @staticmethod
    def prepare(system: MaskedImageSystem, run: Run) -> Generator[Stage, Artifact, MaskedImageTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher."""
        if system.teacher == DEMO:
            if system.data != DEMO:
                raise ConfigError("teacher=demo is trained on data=demo; for your own data pass your own teacher")
            trained = yield demo_teacher_stage(system.teacher_steps)
            teacher = masked.load_masked_autoencoder(str(trained.path))
        else:
            teacher = masked.load_masked_autoencoder(system.teacher)
        config = teacher.config
        if system.data == DEMO:
            found = (digits("train"), digits("test"), plain_processor(int(config.image_size)))
        else:
            found = _user_images(system, config)
        images, test, processor = found
        if images.shape != (config.num_channels, config.image_size, config.image_size):
            raise DataError(
                f"{system.data}: images of shape {images.shape}, the teacher reads "
                f"{(config.num_channels, config.image_size, config.image_size)}; give images that it can read"
            )
        spec = system.student
        if "=" in spec:
            small = masked.masked_autoencoder_from_spec(spec, config)
            small.norm_pix_loss = system.normalise_pixels
            build = partial(masked.new_masked_autoencoder, small, seed=system.seed)
        else:
            build = partial(masked.load_masked_autoencoder, spec)
        task = MaskedImageTask(system, run, teacher, images, test, processor, build)
        task.see(teacher)
        student = build().config
        if masked.patches(student) != masked.patches(config) or student.image_size != config.image_size:
            raise ConfigError(f"student={spec}: must cut images into the teacher's patches")
        return task

    @property
    def visible(self) -> int:
        """Patches of an image that the encoders see."""
        whole = masked.patches(self.teacher.config)
        return masked.visible_patches(whole, self.system.mask_ratio, self.system.rounding)

    def see(self, model: Any) -> Any:
        """Let a model see that many patches; returns it."""
        masked.set_visible(model, self.visible)
        return model

    def source(self) -> Augmented:
        """Batches with ``noise`` (B, L): whoever reads it keeps the same patches, those of the smallest noise."""
        system, count = self.system, masked.patches(self.teacher.config)
        changes: list[Change] = [random_resized_crop()] if system.crop else []
        changes += [random_flip] if system.flip else []

        def masking(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
            return {**batch, "noise": torch.rand(len(batch["pixel_values"]), count, generator=generator)}

        batches = Batches(self.images, system.batch_size, seed=system.seed, gather=True)
        return Augmented(batches, in_turn([*changes, masking]), seed=system.seed)

    def pretrain(self, name: str, objective: Callable[[Observed], Objective]) -> Train:
        """A stage that pre-trains a new student: ``objective`` gets the observed student."""
        system = self.system
        student = Observed(self.see(self.new_student()), name=name)
        per_epoch = max(1, len(self.images) // min(len(self.images), system.batch_size) // system.accumulate)
        optimizer = adamw(system.lr, betas=(0.9, system.beta2), weight_decay=system.weight_decay)
        lr = cosine(1.0, 0.0, warmup=system.warmup)
        return Train(
            name,
            Player(name, student, objective(student), optimizer=optimizer, lr=lr),
            source=self.source(),
            steps=system.steps or max(1, round(system.epochs * per_epoch)),
            accumulate=system.accumulate,
            save=self.save,
        )

    def finetune(self, pretrained: Artifact) -> Train:
        """A stage that trains a classifier, which begins with the pre-trained encoder, on the labels alone."""
        system, classes = self.system, self.images.classes
        model = masked.classifier_of(self.load(pretrained), classes, seed=system.seed)
        classifier = Observed(model, name="classifier")
        changes: list[Change] = [random_flip] if system.flip else []
        changes += [random_erasing(system.erasing)] if system.erasing else []
        changes += [mix_images(len(classes), mixup=system.mixup, cutmix=system.cutmix)]
        batches = Batches(self.images, system.finetune_batch_size, seed=system.seed, gather=True)
        optimizer = adamw(system.finetune_lr, weight_decay=system.weight_decay)
        lr = cosine(1.0, 0.0, warmup=0.05)
        objective = SoftCrossEntropy(classifier.output("logits"))
        return Train(
            "finetuned",
            Player("classifier", classifier, objective, optimizer=optimizer, lr=lr),
            source=Augmented(batches, in_turn(changes), seed=system.seed),
            steps=system.finetune_steps or max(1, round(system.finetune_epochs * len(batches))),
            save=self.save,
        )

    def save(self, model: Any, folder: Path) -> None:
        """Write a model and its image processor the way ``transformers`` loads them."""
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = self.system.mask_ratio
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.see(model) if hasattr(model.config, "mask_ratio") else None

    def load(self, artifact: Artifact) -> ViTMAEForPreTraining:
        """The masked autoencoder a stage left."""
        return masked.load_masked_autoencoder(str(artifact.path)).to(self.run.fabric.device)

    def evaluation(self, models: dict[str, Artifact], finetuned: Artifact | None) -> Evaluate:
        """The final table: linear probes of the teacher and of the pre-trained students; the fine-tuned accuracy."""
        return Evaluate("evaluation", partial(self._evaluate, models, finetuned))

    def _evaluate(self, artifacts: dict[str, Artifact], finetuned: Artifact | None, context: Context) -> Table:
        models = {"teacher": self.teacher.to(self.run.fabric.device)}
        models |= {name: self.load(artifact) for name, artifact in artifacts.items()}
        count = len(self.images) if self.system.probe_labels is None else self.system.probe_labels
        labelled = subset(self.images, min(count, len(self.images)), seed=self.system.seed)
        rows = []
        for name, model in models.items():
            features = [self.features(model, images) for images in (labelled, self.test)]
            row: dict[str, Any] = {
                "name": name,
                "parameters": parameter_count(model.vit),
                "probe": linear_probe(features[0], labelled.labels, features[1], self.test.labels),
            }
            if name == "student" and finetuned is not None:
                row["finetuned"] = self.accuracy(finetuned)
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        note = f"{len(self.test):,} held-out images ({self.images.name}); probes read {len(labelled):,} labels."
        return Table("What encoders know", COLUMNS, rows, [note])

    def batches(self, images: Images) -> Iterator[Batch]:
        """Images in batches, in order, on the run's device."""
        for start in range(0, len(images), LOOK):
            yield self.run.fabric.to_device(images[list(range(start, min(len(images), start + LOOK)))])

    @torch.no_grad()
    def features(self, model: ViTMAEForPreTraining, images: Images) -> Tensor:
        """The mean over the patches of what the encoder says of whole images, (N, D), on the CPU."""
        whole = masked.patches(model.config)
        masked.set_visible(model, whole)
        order = torch.arange(float(whole), device=model.device)
        found = [
            model.vit(batch["pixel_values"], noise=order.expand(len(batch["labels"]), -1)).last_hidden_state[:, 1:]
            for batch in self.batches(images)
        ]
        self.see(model)
        return torch.cat([tokens.mean(1).float().cpu() for tokens in found])

    @torch.no_grad()
    def accuracy(self, artifact: Artifact) -> float:
        """Share of the test images that a fine-tuned classifier gets right."""
        from transformers import ViTForImageClassification

        model: nn.Module = ViTForImageClassification.from_pretrained(artifact.path).to(self.run.fabric.device).eval()
        hits = sum(
            int((model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum())
            for batch in self.batches(self.test)
        )
        return hits / len(self.test)


COLUMNS = [
    Column("parameters", "encoder parameters", ",d"),
    Column(
        "probe", "linear probe", ".1%", "higher", "accuracy of logistic regression on the frozen mean patch feature"
    ),
    Column("finetuned", "fine-tuned", ".1%", "higher", "accuracy of the encoder trained further with a linear head"),
]


def _user_images(system: MaskedImageSystem, config: ViTMAEConfig) -> tuple[Images, Images, Any]:
    rows = system.image_rows()
    processor = image_processor(system.teacher, image_size=config.image_size, channels=config.num_channels)
    read = partial(rows.images, process=pixels_of(processor), channels=config.num_channels)
    if rows.test is not None:
        return read(rows.train), read(rows.test), processor
    tested, trained = held_out(len(rows.train), (system.test,), name=system.data)
    return read(rows.train.select(trained)), read(rows.train.select(tested)), processor


# -- the embedded teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoTeacher:
    """How the embedded teacher is made; part of its fingerprint in the cache."""

    image_size: int = 8
    patch_size: int = 2
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 256
    decoder_hidden_size: int = 32
    decoder_layers: int = 1
    mask_ratio: float = 0.75
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0

    def config(self) -> Any:
        """The ``ViTMAEConfig`` of it."""
        from transformers import ViTMAEConfig

        return ViTMAEConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=1,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            decoder_hidden_size=self.decoder_hidden_size,
            decoder_num_hidden_layers=self.decoder_layers,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=4 * self.decoder_hidden_size,
            mask_ratio=self.mask_ratio,
            layer_norm_eps=1e-6,
        )


def demo_teacher_stage(steps: int) -> Train:
    """The stage that trains the embedded teacher on digits, shared between runs."""
    recipe, images = DemoTeacher(), digits("train")
    config = recipe.config()

    def masking(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return {**batch, "noise": torch.rand(len(batch["labels"]), masked.patches(config), generator=generator)}

    def player() -> Player:
        teacher = Observed(masked.new_masked_autoencoder(config, seed=recipe.seed), name="teacher")
        optimizer = adamw(recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
        lr = cosine(1.0, 0.0, warmup=0.1)
        return Player("teacher", teacher, Reconstruction(teacher), optimizer=optimizer, lr=lr)

    batches = Batches(images, recipe.batch_size, seed=recipe.seed, gather=True)
    return Train(
        "teacher",
        player,
        source=Augmented(batches, masking, seed=recipe.seed),
        steps=steps,
        cache={**asdict(recipe), "steps": steps, "data": images.fingerprint()},
    )
