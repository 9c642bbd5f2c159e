"""DMAE: a small masked autoencoder learns the features of a large one while both see the same few patches."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.masked import FeatureAlignment, Projector, Reconstruction, projector
from stillhouse.tasks.masked_images import MaskedImageSystem, MaskedImageTask


@dataclass(kw_only=True)
class DMAE(MaskedImageSystem):
    """Masked autoencoders enable efficient knowledge distillers (Bai et al., CVPR 2023, arXiv 2208.12256).

    The student's own pre-training (pixels of masked patches) plus, for each pair of blocks, the mean absolute
    difference between unit-length features of teacher and projected student, on the visible patches and the class
    token. The teacher is a masked autoencoder itself; it runs as far as its last aligned block.
    """

    meta = Meta(
        card=118,
        title="DMAE",
        domain="vision",
        family="masked feature KD",
        citation="Bai et al. (2023), Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR 2023, "
        "arXiv 2208.12256",
        feedback=("features", "data"),
        granularity="patch",
        elicitation="feature",
        algorithm="similarity",
        knowledge="feature",
        modality="image",
        stages=2,
        role="smaller models",
    )
    demo: ClassVar = {**MaskedImageSystem.demo, "teacher_blocks": [2], "student_blocks": [1]}

    teacher_blocks: Annotated[list[int], "teacher blocks that are aligned, counted from 0 (ViT-L: 17 of 24)"] = field(
        default_factory=lambda: [17]
    )
    student_blocks: Annotated[list[int], "student blocks that they are aligned with (ViT-B: 8 of 12)"] = field(
        default_factory=lambda: [8]
    )
    projector: Annotated[Projector, "from the student's width to the teacher's; none compares plain features"] = (
        "linear"
    )
    distance: Annotated[Literal["l1", "l2"], "absolute or squared difference"] = "l1"
    align_weight: Annotated[float, "weight of each pair; 0 is the masked autoencoder alone", Ge(0)] = 1.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from MaskedImageTask.prepare(self, run)
        student = yield task.pretrain("student", lambda observed: self.objective(task, observed))
        finetuned = None
        if self.finetune_epochs:
            finetuned = yield task.finetune(student)
        yield task.evaluation({"student": student}, finetuned)

    def objective(self, task: MaskedImageTask, student: Observed) -> Objective:
        """L_rec + weight * sum over pairs of L_align."""
        teacher = Observed(task.teacher, frozen=True, name="teacher")
        objective: Objective = Reconstruction(student)
        if not self.align_weight:
            return objective
        for t, s in self.pairs(teacher.module, student.module):
            modules: list[Any] = [student.module, teacher.module]
            term = FeatureAlignment(
                student.tap(f"vit.layers.{s}"),
                teacher.tap(f"vit.layers.{t}"),
                projection=projector(self.projector, *(module.config.hidden_size for module in modules)),
                power=1 if self.distance == "l1" else 2,
                name=f"align_{t}_{s}",
            )
            objective += self.align_weight * term
        return objective

    def pairs(self, teacher: Any, student: Any) -> list[tuple[int, int]]:
        """Aligned blocks, teacher's and student's; a `ConfigError` names one that does not exist."""
        if len(self.teacher_blocks) != len(self.student_blocks) or not self.teacher_blocks:
            raise ConfigError(
                f"dmae: teacher_blocks={self.teacher_blocks} and student_blocks={self.student_blocks} must pair up"
            )
        for name, blocks, model in (
            ("teacher", self.teacher_blocks, teacher),
            ("student", self.student_blocks, student),
        ):
            depth = model.config.num_hidden_layers
            for block in blocks:
                if not 0 <= block < depth:
                    raise ConfigError(
                        f"dmae: {name}_blocks={block}: the {name} has blocks 0 to {depth - 1}; about three quarters "
                        f"of the depth is usual ({max(0, depth * 3 // 4 - 1)})"
                    )
        return list(zip(self.teacher_blocks, self.student_blocks, strict=True))

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"finetune_epochs": 0}
        variants = {"DMAE": ("dmae", common), "MAE": ("dmae", {**common, "align_weight": 0.0})}
        central = Claim(
            statement="aligning the features of a pre-trained masked autoencoder during its own pre-training gives a "
            "small masked autoencoder a better encoder",
            metric="accuracy of a linear probe from 100 labels",
            method="DMAE",
            baseline="MAE",
            variants=variants,
            measure=lambda artifacts: artifacts["evaluation"].metrics["student/probe"],
            higher_is_better=True,
            seeds=3,
            budget="equal images, masks, steps, initial weights and learning rates",
        )
        extreme = replace(
            central,
            statement="so it does where a single patch of 16 is visible",
            variants={
                f"{name}, one patch": (source, {**values, "mask_ratio": 0.94})
                for name, (source, values) in variants.items()
            },
            method="DMAE, one patch",
            baseline="MAE, one patch",
        )
        return [central, extreme]
