"""SlimSAM: prune one structure of a SAM encoder, align the other; then the other way round."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, step
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.models import pruning, sam
from stillhouse.objectives.feature_sets import DisturbedMSE, FeatureSetMSE
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.segmentation import SegmentationSystem, SegmentationTask

if TYPE_CHECKING:
    from transformers import SamModel


@dataclass(kw_only=True)
class SlimSAM(SegmentationSystem):
    """SlimSAM: 0.1 % data makes segment anything slim (Chen, Fang, Ma and Wang, NeurIPS 2024, arXiv 2312.05284).

    First the residual stream (``embedding``) of the image encoder is pruned and its uncut bottleneck aligned with the
    teacher; then the head dimensions and MLP hidden units (``bottleneck``) are pruned and the residual stream aligned
    with the intermediate model, fading to the teacher. Channels are scored by |w dL/dw| on the label-free loss
    |E_S - (E_T + noise)|^2: without the noise it and its gradient are zero. Prompt encoder and mask decoder stay.
    """

    meta = Meta(
        card=104,
        title="SlimSAM",
        domain="vision",
        family="structured pruning with feature KD",
        citation="Chen, Fang, Ma and Wang (2024), SlimSAM: 0.1% Data Makes Segment Anything Slim, NeurIPS 2024, "
        "arXiv 2312.05284",
        feedback="features",
        granularity=("patch", "model"),
        elicitation="feature",
        algorithm=("pruning", "similarity"),
        knowledge="feature",
        modality="image",
        stages=4,
        role="compression",
    )
    demo: ClassVar = {**SegmentationSystem.demo, "gradient_images": 128}
    smoke: ClassVar = {
        "teacher_steps": 20,
        "steps": 22,
        "images": 64,
        "batch_size": 4,
        "validation_images": 8,
        "test_images": 8,
    }

    ratio: Annotated[float, "share of each structure's channels that goes (SlimSAM-77: 0.77)", Gt(0), Lt(1)] = 0.5
    importance: Annotated[
        Literal["disturbed", "taylor", "magnitude", "random"],
        "what a channel is worth; taylor: without the noise, which is zero before the first cut",
    ] = "disturbed"
    noise: Annotated[float, "standard deviation of the noise on the teacher's embedding", Ge(0)] = 0.01
    gradient_images: Annotated[int, "images whose gradients are summed for the scores", Ge(1)] = 1000
    bottleneck_ranking: Annotated[
        Literal["global", "local"],
        "rank bottleneck channels across blocks, or in each; only what is pruned locally loads as a plain SamModel",
    ] = "global"
    positions: Annotated[
        Literal["reset", "slice"], "relative position tables: set to zero after a cut, as published, or cut themselves"
    ] = "reset"
    align_weight: Annotated[float, "weight of the bottleneck features in the first alignment", Ge(0), Le(1)] = 0.5
    align_epochs: Annotated[int, "passes after which the first alignment looks at the embedding alone", Ge(0)] = 10
    dynamic_epochs: Annotated[int, "passes over which the second alignment leaves the intermediate model", Ge(1)] = 11
    alternate: Annotated[bool, "slim the structures in turn; off: both at once, then twice the epochs of plain MSE"] = (
        True
    )
    inherit: Annotated[bool, "keep the weights of what is left; off: the same shape with new weights"] = True

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from SegmentationTask.prepare(self, run)
        teacher = Observed(task.teacher.vision_encoder, frozen=True, name="teacher")
        parts: tuple[tuple[str, ...], ...] = (("embedding",), ("bottleneck",))
        if not self.alternate:
            parts = (("embedding", "bottleneck"),)
        model = task.teacher
        for number, part in enumerate(parts, start=1):
            cut = yield Transform(f"prune-{'-'.join(part)}", partial(self.prune, task, model, part), save=task.save)
            name = "student" if number == len(parts) else "intermediate"
            objective: Callable[[Observed], Objective] = partial(self.embedding_alone, teacher=teacher)
            if self.alternate and number == 1:
                objective = partial(self.bottleneck_aligning, teacher=teacher)
            elif self.alternate:
                intermediate = Observed(model.vision_encoder, frozen=True, name="intermediate")
                objective = partial(self.embedding_aligning, teacher=teacher, intermediate=intermediate)
            trained = yield task.distil(
                name, task.load(cut), objective, patience=2 + number, length=1 if self.alternate else 2
            )
            model = task.load(trained)
        yield task.evaluation({"pruned": cut, "student": trained})

    def prune(self, task: SegmentationTask, source: SamModel, parts: tuple[str, ...], context: Context) -> SamModel:
        """A copy of ``source`` without the channels of ``parts`` that are worth least."""
        model = copy.deepcopy(source).requires_grad_(True)
        encoder = model.vision_encoder
        kinds = {
            "embedding": [[sam.embedding_group(encoder)]],
            "bottleneck": [sam.head_dim_groups(encoder), sam.mlp_groups(encoder)],  # ranked apart, as published
        }
        found = self.scores(task, source, model, [group for part in parts for kind in kinds[part] for group in kind])
        for part in parts:
            across = part == "bottleneck" and self.bottleneck_ranking == "global"
            for groups in kinds[part]:
                left = pruning.prune_groups(encoder, groups, found, self.ratio, across=across)
                context.results |= {f"kept/{name}": float(count) for name, count in left.items()}
        if self.positions == "reset":
            sam.reset_positions(encoder)
        sam.fit_config(model)
        if not self.inherit:
            sam.renew(encoder)
        return model.requires_grad_(True)

    def scores(
        self, task: SegmentationTask, source: SamModel, model: SamModel, groups: list[pruning.Group]
    ) -> pruning.Scores:
        """What every channel of ``groups`` is worth; the target is the model before the cut."""
        if self.importance == "random":
            return pruning.random_scores(groups)
        if self.importance == "magnitude":
            return pruning.magnitude_scores(model.vision_encoder, groups)
        target = Observed(source.vision_encoder, frozen=True, name="target")
        student, noise = Observed(model.vision_encoder, mode="eval"), self.noise * (self.importance == "disturbed")
        loss = DisturbedMSE(sam.image_embedding(student), sam.image_embedding(target), std=noise)
        images = task.batches(shuffle=False, limit=self.gradient_images)
        batches = (task.run.fabric.to_device(next(images)) for _ in range(len(images)))
        return pruning.taylor_scores(student.module, groups, pruning.summed_gradients(student.module, loss, batches))

    def bottleneck_aligning(self, student: Observed, *, teacher: Observed) -> Objective:
        """(1 - a) MSE of the embedding + a (MSE of windowed qkv + of global qkv + of MLP hidden units), then MSE."""
        ends = (self.align_epochs / self.epochs,)
        weight, rest = step((self.align_weight, 0.0), at=ends), step((1 - self.align_weight, 1.0), at=ends)
        objective = rest * self.embedding_alone(student, teacher=teacher)
        theirs = sam.qkv_taps(teacher)
        for kind, taps in sam.qkv_taps(student).items():
            objective += weight * FeatureSetMSE(taps, theirs[kind], name=f"{kind} qkv")
        return objective + weight * FeatureSetMSE(sam.mlp_taps(student), sam.mlp_taps(teacher), name="mlp hidden")

    def embedding_aligning(self, student: Observed, *, teacher: Observed, intermediate: Observed) -> Objective:
        """(1 - a) MSE to the teacher's embedding + a (MSE to the intermediate model's residual stream + embedding)."""
        weight, rest = self.dynamic_weights()
        return (
            rest * self.embedding_alone(student, teacher=teacher)
            + weight
            * FeatureSetMSE(sam.residual_taps(student), sam.residual_taps(intermediate), name="residual stream")
            + weight * self.embedding_alone(student, teacher=intermediate).named("intermediate embedding")
        )

    def dynamic_weights(self) -> tuple[Schedule, Schedule]:
        """a_e = (n - 1 - e) / n in epoch e < n, then 0; and 1 - a_e. For n = 11: 10/11, 9/11, ..., 0."""
        n = self.dynamic_epochs
        weights = [(n - 1 - e) / n for e in range(n)]
        at = [e / self.epochs for e in range(1, n)]
        return step(weights, at=at), step([1 - weight for weight in weights], at=at)

    def embedding_alone(self, student: Observed, *, teacher: Observed) -> Objective:
        """MSE of the image embeddings."""
        return FeatureSetMSE([sam.image_embedding(student)], [sam.image_embedding(teacher)], name="embedding")

    def claims(self) -> list[Claim]:
        cut: dict[str, Any] = {"alternate": False, "steps": 1}  # looked at before anything is trained
        arms: dict[str, dict[str, Any]] = {
            "alternate": {},
            "one-shot": {"alternate": False},
            "from scratch": {"alternate": False, "inherit": False},
            "cut": cut,
        }
        criteria = {"magnitude": "magnitude", "chance": "random", "the scores without noise": "taylor"}
        for by, name in criteria.items():
            arms |= {f"by {by}": {"importance": name}, f"cut by {by}": {**cut, "importance": name}}
        trained = Experiment("slimsam", arms, "equal shapes of the students, images, steps and learning rates")
        miou = ("mean IoU of held-out masks asked for by a point", "student/miou", "alternate")
        chosen = Experiment("slimsam", arms, "equal shares of channels cut, images, steps and learning rates")
        mse = ("mean squared error to the teacher's image embedding, both cut", "pruned/embedding_mse", "cut")
        at_once = "slimming the two structures in turn gives better masks than cutting both at once and distilling "
        new = "with few images, what is left of a pruned teacher is a better student than the same shape with "
        better, nearer = "disturbed Taylor scores leave a better student than", "disturbed Taylor scores cost less than"
        less: dict[str, Any] = {"higher_is_better": False, "scope": "consequence"}
        return [
            trained.claim(f"{at_once}the embedding for as many steps", *miou, "one-shot"),
            trained.claim(f"{new}new weights", *miou, "from scratch", scope="consequence"),
            *(chosen.claim(f"{better} {by}", *miou, f"by {by}") for by in ("magnitude", "chance")),
            *(chosen.claim(f"{nearer} {by}", *mse, f"cut by {by}", **less) for by in criteria),
        ]
