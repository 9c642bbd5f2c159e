"""Training on mixed images: mixup and cutmix in a vision system's stages."""

from __future__ import annotations

from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.train import Train
from stillhouse.data.crops import mix_images
from stillhouse.data.sources import Augmented
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.soft_labels import SoftCrossEntropy
from stillhouse.tasks.vision import VisionTask

APART = 500_009  # the mixing draws other numbers than the augmentation before it


def labels_entry(*, mixup: float, cutmix: float) -> str:
    """The entry of the batch that holds the labels."""
    return "soft_labels" if mixup > 0 or cutmix > 0 else "labels"


def label_loss(student: Observed, entry: str) -> Objective:
    """Cross-entropy to the labels in this entry of the batch."""
    logits = student.output("logits")
    return CrossEntropy(logits) if entry == "labels" else SoftCrossEntropy(logits, target=entry)


def mixed(stage: Train, task: VisionTask, *, mixup: float, cutmix: float) -> Train:
    """The stage with its images mixed, if any of the two parameters is above 0; see `mix_images`."""
    if mixup > 0 or cutmix > 0:
        change = mix_images(len(task.classes), mixup=mixup, cutmix=cutmix, smoothing=0.0)
        stage.source = Augmented(stage.source, change, seed=task.system.seed + APART)
    return stage
