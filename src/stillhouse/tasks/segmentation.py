"""The promptable segmentation task: SAM teachers, images, and masks asked for by a point or a box.

`SegmentationSystem` has the fields that such systems share; `SegmentationTask.prepare` turns them into a teacher,
unlabelled images to distil on, and annotated ones to measure by. On the embedded task the images are
`stillhouse.data.shapes`, and a small SAM is trained on them once and kept in the cache.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.segments import Fit, load_segments
from stillhouse.data.shapes import Shapes
from stillhouse.data.sources import Batches
from stillhouse.metrics.segmentation import MeanIoU
from stillhouse.models.sam import load_sam, new_sam
from stillhouse.models.scaling import parameter_count
from stillhouse.objectives.plateau import ReduceOnPlateau
from stillhouse.objectives.segmentation import MaskLoss
from stillhouse.tasks.segmentation_pictures import draw_masks

if TYPE_CHECKING:
    from transformers import SamModel

DEMO = "demo"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
Item = Mapping[str, Tensor]


@dataclass(kw_only=True)
class SegmentationSystem(System):
    """Fields of every system that distils promptable segmentation models."""

    teacher: Annotated[str, "directory or hub id of a SamModel; 'demo': a small one, trained once on shapes"] = DEMO
    data: Annotated[str, "folder of images (with .json of SA-1B beside them, or not), hub data set id, or 'demo'"] = (
        DEMO
    )
    split: Annotated[str, "split of a hub data set"] = "train"
    images: Annotated[int, "images to distil on, without their masks; drawn by the seed", Ge(1)] = 10_000
    validation_images: Annotated[int, "images held out to choose weights and learning rate by", Ge(1)] = 50
    test_images: Annotated[int, "images held out for the final table", Ge(1)] = 50
    batch_size: Annotated[int, "images in a micro-batch, all processes together", Ge(1)] = 1
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 4
    epochs: Annotated[int, "passes over the images in each training stage", Ge(1)] = 20
    steps: Annotated[int | None, "optimizer steps of each stage; by default as many as the epochs need", Ge(1)] = None
    lr: Annotated[float, "learning rate of Adam", Gt(0)] = 1e-4
    teacher_steps: Annotated[int, "steps that the embedded teacher is trained for", Ge(1)] = 800

    demo: ClassVar[dict[str, Any]] = {
        "images": 128,
        "validation_images": 25,
        "test_images": 100,
        "batch_size": 16,
        "accumulate": 1,
        "lr": 1e-3,
    }

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO


@dataclass
class SegmentationTask:
    """What a segmentation system works with, once its fields have been turned into objects.

    ``train`` are images without masks; ``validation`` and ``test`` hold ``image``, ``masks`` (K, S, S), ``points``
    (K, 2) and, where masks are annotated, ``boxes`` (K, 4). Where they are not, the teacher's own masks at a grid of
    points are the truth that students are measured by.
    """

    system: SegmentationSystem
    run: Run
    teacher: SamModel
    train: Sequence[Item]
    validation: list[Item]
    test: list[Item]

    @staticmethod
    def prepare(system: SegmentationSystem, run: Run) -> Generator[Stage, Artifact, SegmentationTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher."""
        if system.teacher == DEMO:
            if system.data != DEMO:
                raise ConfigError("teacher=demo is trained on data=demo; for your own data pass your own teacher")
            trained = yield demo_teacher_stage(system.teacher_steps)
            teacher = load_sam(str(trained.path))
        else:
            teacher = load_sam(system.teacher)
        teacher = teacher.to(run.fabric.device)
        size = int(teacher.config.vision_config.image_size)
        held_out = system.validation_images + system.test_images
        if system.data == DEMO:
            train: Any = Standardised(Shapes(DemoTeacher().images, size=size, seed=0))
            other: Any = Standardised(Shapes(held_out, size=size, seed=1))
        else:
            pictures: Any = load_segments(system.data, Fit(size), split=system.split)
            if len(pictures) <= held_out:
                raise DataError(
                    f"{system.data}: {len(pictures)} images, of which {held_out} are held out; give more, or lower "
                    "validation_images and test_images"
                )
            cut = len(pictures) - held_out
            train = torch.utils.data.Subset(pictures, range(cut))
            other = torch.utils.data.Subset(pictures, range(cut, len(pictures)))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(system.seed)).tolist()
        measured = [with_truth(other[i], teacher) for i in range(held_out)]
        return SegmentationTask(
            system,
            run,
            teacher,
            cast(Any, torch.utils.data.Subset(train, order[: system.images])),
            measured[: system.validation_images],
            measured[system.validation_images :],
        )

    def batches(self, *, shuffle: bool = True, limit: int | None = None) -> Batches:
        """The unlabelled images, endlessly, as ``pixel_values`` (B, 3, S, S)."""
        count = min(limit or len(self.train), len(self.train))
        data: Any = torch.utils.data.Subset(cast(Any, self.train), range(count))
        return Batches(data, self.system.batch_size, seed=self.system.seed, shuffle=shuffle, collate=collate_pixels)

    def distil(
        self,
        name: str,
        model: SamModel,
        objective: Callable[[Observed], Objective],
        *,
        patience: int,
        factor: float = 0.5,
        length: int = 1,
    ) -> Train:
        """A stage that trains the vision encoder of ``model``; the rest of it stays as it is.

        Once per pass over the images the mean IoU on the validation images is looked at: the best weights are kept,
        and the learning rate is multiplied by ``factor`` after more than ``patience`` looks without a better one.
        ``length`` multiplies the system's epochs.
        """
        system = self.system
        model = model.to(self.run.fabric.device)
        student = Observed(model.vision_encoder, name=name)
        per_epoch = max(1, len(self.batches()) // system.accumulate)
        lr = ReduceOnPlateau(factor=factor, patience=patience)

        def look() -> dict[str, float]:
            figure = measure(model, self.validation)["miou"]
            lr.watch(figure)
            return {"val_miou": figure}

        return Train(
            name,
            Player(name, student, objective(student), optimizer=adamw(system.lr, weight_decay=0.0), lr=lr),
            source=self.batches(),
            steps=length * (system.steps or system.epochs * per_epoch),
            accumulate=system.accumulate,
            evaluate=look,
            eval_every=per_epoch,
            best="-val_miou",
            result=model,
            save=self.save,
        )

    def save(self, model: Any, folder: Path) -> None:
        """Write a SAM the way ``transformers`` does, with the teacher's image processor where it has one."""
        model.save_pretrained(folder)
        for name in PROCESSOR_FILES:
            if (file := Path(self.system.teacher).expanduser() / name).is_file():
                shutil.copyfile(file, folder / name)

    def load(self, artifact: Artifact) -> SamModel:
        """The model a stage left."""
        return load_sam(str(artifact.path)).to(self.run.fabric.device)

    def evaluation(self, models: dict[str, Artifact]) -> Evaluate:
        """The final table: the teacher beside the models that were trained; with a picture of their masks."""
        return Evaluate("evaluation", partial(self._evaluate, models))

    def _evaluate(self, artifacts: dict[str, Artifact], context: Context) -> tuple[Table, dict[str, Any]]:
        models = {"teacher": self.teacher} | {name: self.load(artifact) for name, artifact in artifacts.items()}
        rows = []
        for name, model in models.items():
            row: dict[str, Any] = {"name": name, "parameters": parameter_count(model.vision_encoder)}
            row |= measure(model, self.test, reference=self.teacher)
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        objects = sum(len(item["masks"]) for item in self.test)
        note = f"{objects} objects in {len(self.test)} held-out images ({self.system.data})."
        shown = self.test[:3]
        pictures = [(item["image"], item["masks"], item["points"]) for item in shown]
        drawn = {name: [predict(model, item)[0] for item in shown] for name, model in models.items()}
        return Table("Masks of held-out images", COLUMNS, rows, [note]), {"samples.svg": draw_masks(pictures, drawn)}


COLUMNS = [
    Column("parameters", "encoder parameters", ",d"),
    Column("miou", "mIoU, point", ".1%", "higher", "mean IoU with the truth, asked by one point"),
    Column("miou_box", "mIoU, box", ".1%", "higher", "mean IoU with the truth, asked by the box"),
    Column("agreement", "agreement", ".1%", "higher", "mean IoU with the teacher's mask, asked by the same point"),
    Column("embedding_mse", "embedding MSE", ".4f", "lower", "mean squared error to the teacher's image embedding"),
]


# -- images and masks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standardised:
    """Generated items with their image brought to about zero mean and unit deviation."""

    items: Shapes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        item = self.items[index]
        return {**item, "image": (item["image"] - 0.5) / 0.25}


def collate_pixels(items: Sequence[Item]) -> dict[str, Tensor]:
    """The images of items as a batch that SAM reads; nothing else of them."""
    return {"pixel_values": torch.stack([item["image"] for item in items])}


def collate_prompted(items: Sequence[Item]) -> dict[str, Tensor]:
    """A batch with masks (B, K, S, S), asked for by points or by boxes: a coin of torch's global generator decides."""
    batch = {**collate_pixels(items), "masks": torch.stack([item["masks"] for item in items])}
    if torch.rand(()) < 0.5:
        return {**batch, "input_boxes": torch.stack([item["boxes"] for item in items])}
    return {**batch, "input_points": torch.stack([item["points"] for item in items])[:, :, None]}


@torch.no_grad()
def masks_of(
    model: SamModel, embedding: Tensor, *, points: Tensor | None = None, boxes: Tensor | None = None
) -> Tensor:
    """Boolean masks (B, K, S, S) from image embeddings (B, C, h, w), for points (B, K, 2) or boxes (B, K, 4)."""
    asked = {"input_boxes": boxes} if points is None else {"input_points": points[:, :, None]}
    logits = model(image_embeddings=embedding, multimask_output=False, **asked).pred_masks[:, :, 0]
    size = int(model.config.vision_config.image_size)
    if logits.shape[-1] != size:
        logits = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
    return logits > 0


@torch.no_grad()
def with_truth(item: Item, teacher: SamModel, *, grid: int = 3) -> Item:
    """The item; one without masks gets the teacher's at a grid of points, those that are not empty."""
    if "masks" in item:
        return item
    device = teacher.device
    ys, xs = item["inside"].nonzero(as_tuple=True)
    steps = (torch.arange(grid) + 0.5) / grid
    corners = torch.cartesian_prod(steps * (int(xs.max()) + 1), steps * (int(ys.max()) + 1)).floor()
    embedding = teacher.get_image_embeddings(item["image"][None].to(device))
    masks = masks_of(teacher, embedding, points=corners[None].to(device))[0].cpu() & item["inside"]
    found = masks.flatten(1).any(1)
    if not found.any():  # nothing anywhere: the whole picture is the object
        found[0], masks[0] = True, item["inside"]
    return {**item, "masks": masks[found], "points": corners[found]}


def chunks(items: Sequence[Item], most: int = 16) -> Iterator[dict[str, Tensor]]:
    """Items in batches, those together that have equally many masks and the same entries."""
    for _, alike in itertools.groupby(items, key=lambda item: (len(item["masks"]), sorted(item))):
        together = list(alike)
        for part in (together[at : at + most] for at in range(0, len(together), most)):
            yield {name: torch.stack([item[name] for item in part]) for name in part[0]}


@torch.no_grad()
def measure(model: SamModel, items: Sequence[Item], *, reference: SamModel | None = None) -> dict[str, float]:
    """Mean IoU of the model's masks: ``miou`` (points), ``miou_box`` where there are boxes; with a reference also
    ``agreement`` (IoU with its masks) and ``embedding_mse``.
    """
    device = model.device
    point, box, agreement = MeanIoU(), MeanIoU(), MeanIoU()
    squares, count = 0.0, 0
    for batch in ({name: value.to(device) for name, value in chunk.items()} for chunk in chunks(items)):
        inside = batch.get("inside", torch.ones((), dtype=torch.bool, device=device))
        inside = inside[:, None] if inside.ndim else inside
        truth = batch["masks"].flatten(0, 1)
        embedding = model.get_image_embeddings(batch["image"])
        masks = (masks_of(model, embedding, points=batch["points"]) & inside).flatten(0, 1)
        point.add(masks, truth)
        if "boxes" in batch:
            box.add((masks_of(model, embedding, boxes=batch["boxes"]) & inside).flatten(0, 1), truth)
        if reference is not None:
            other = reference.get_image_embeddings(batch["image"])
            agreement.add(masks, (masks_of(reference, other, points=batch["points"]) & inside).flatten(0, 1))
            squares += float((embedding - other).double().square().sum())
            count += other.numel()
    figures = {"miou": point.value, **({"miou_box": box.value} if box.count else {})}
    if reference is not None:
        figures |= {"agreement": agreement.value, "embedding_mse": squares / max(1, count)}
    return figures


def predict(model: SamModel, item: Item) -> Tensor:
    """The model's masks (1, K, S, S) of one item, asked for by its points."""
    embedding = model.get_image_embeddings(item["image"][None].to(model.device))
    return masks_of(model, embedding, points=item["points"][None].to(model.device)).cpu()


# -- the embedded teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoTeacher:
    """How the embedded teacher is made; part of its fingerprint in the cache."""

    image_size: int = 32
    patch_size: int = 4
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    window: int = 4
    global_layers: tuple[int, ...] = (1, 3)
    embedding: int = 64
    initializer_range: float = 0.08
    images: int = 2000
    batch_size: int = 16
    lr: float = 2e-3
    seed: int = 0

    def config(self) -> Any:
        """The ``SamConfig`` of it."""
        from transformers import SamConfig

        vision = {
            "hidden_size": self.hidden_size,
            "mlp_dim": 4 * self.hidden_size,
            "output_channels": self.embedding,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "window_size": self.window,
            "global_attn_indexes": list(self.global_layers),
            "num_pos_feats": self.embedding // 2,
            "initializer_range": self.initializer_range,
        }
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        prompt = {"hidden_size": self.embedding, "mask_input_channels": 4, **sizes}
        decoder = {
            "hidden_size": self.embedding,
            "mlp_dim": 2 * self.embedding,
            "num_attention_heads": self.heads,
            "iou_head_hidden_dim": self.embedding,
        }
        config = SamConfig(
            vision_config=vision,
            prompt_encoder_config=prompt,
            mask_decoder_config=decoder,
            initializer_range=self.initializer_range,
        )
        config.vision_config.scale = 1.0  # of the random positions, as SAM was trained: larger ones do not generalise
        return config


def demo_teacher_stage(steps: int) -> Train:
    """The stage that trains the embedded teacher on shapes, shared between runs."""
    recipe = DemoTeacher()

    def player() -> Player:
        teacher = Observed(new_sam(recipe.config(), seed=recipe.seed), options={"multimask_output": False})
        objective = MaskLoss(teacher.output("pred_masks"), teacher.output("iou_scores"))
        optimizer = adamw(recipe.lr, weight_decay=0.05)
        return Player("teacher", teacher, objective, optimizer=optimizer, lr=cosine(1.0, 0.0, warmup=0.05), clip=1.0)

    images = Standardised(Shapes(recipe.images, size=recipe.image_size, seed=0))
    return Train(
        "teacher",
        player,
        source=Batches(images, recipe.batch_size, seed=recipe.seed, collate=collate_prompted),
        steps=steps,
        cache={**asdict(recipe), "steps": steps, "task": "shapes"},
    )
