"""FTD: a few learnt images on which students follow experts that were trained to lie in flat regions."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.ema import EMA
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.data.condensation.synthetic import SyntheticImages, from_parquet
from stillhouse.data.images import Images
from stillhouse.data.sources import Drawn
from stillhouse.objectives.trajectory import FlatCrossEntropy, TrajectoryMatching
from stillhouse.tasks.condensation import CondensationSystem, CondensationTask, images_and_rate


@dataclass(kw_only=True)
class FTD(CondensationSystem):
    """Minimizing the accumulated trajectory error (Du et al., CVPR 2023, arXiv 2211.11004).

    Students take ``student_steps`` steps on the learnt images from where an expert stood, and should end where it
    stood ``expert_epochs`` later. When the images are used, a student starts each such segment with the error of the
    last one; experts trained by GSAM lie where such errors grow less. With ``flat=false`` this is MTT (Cazenavette et
    al., 2022, arXiv 2203.11932).
    """

    meta = Meta(
        card=94,
        title="FTD",
        domain="vision",
        family="data set distillation by trajectory matching",
        citation="Du, Jiang, Tan, Zhou and Li (2023), Minimizing the Accumulated Trajectory Error to Improve Dataset "
        "Distillation, CVPR 2023, arXiv 2211.11004",
        feedback="data",
        teacher_access="white-box",
        granularity="data set",
        policy="off-policy",
        elicitation="none",
        algorithm="condensation",
        knowledge="data",
        scheme="offline",
        modality="image",
        stages="experts, 2, and the networks measured",
        role="compression",
    )
    demo: ClassVar = {
        **CondensationSystem.demo,
        "experts": 8,
        "epochs": 20,
        "expert_lr": 0.1,
        "expert_batch": 64,
        "rho": 0.05,
        "student_steps": 10,
        "max_start": 8,
        "steps": 300,
        "optimizer": "adam",
        "lr": 0.02,
        "step_size": 0.1,
        "step_size_lr": 1e-3,
        "ema": 0.99,
    }
    smoke: ClassVar = {
        "experts": 1,
        "epochs": 2,
        "expert_batch": 128,
        "max_start": 0,
        "steps": 12,
        "networks": 1,
        "network_steps": 12,
        "compare": False,
    }
    product: ClassVar[str] = "condensed"

    flat: Annotated[bool, "train experts by GSAM; off: by plain SGD, which is MTT"] = True
    experts: Annotated[int, "networks whose training is followed", Ge(1)] = 100
    epochs: Annotated[int, "of each expert", Ge(1)] = 50
    expert_lr: Annotated[float, "learning rate of their SGD", Gt(0)] = 0.01
    expert_batch: Annotated[int, "images in their batches", Ge(1)] = 256
    rho: Annotated[float, "size of GSAM's perturbation", Gt(0)] = 0.01
    alpha: Annotated[float, "share of the upright gradient that GSAM takes off; 0: adaptive SAM", Ge(0)] = 0.4
    student_steps: Annotated[int, "SGD steps on learnt images in a segment", Ge(1)] = 30
    student_batch: Annotated[int | None, "learnt images in a step; none: all", Ge(1)] = None
    expert_epochs: Annotated[int, "of the expert in a segment", Ge(1)] = 2
    max_start: Annotated[int, "latest epoch a segment starts from", Ge(0)] = 20
    steps: Annotated[int, "updates of the images", Ge(1)] = 5000
    optimizer: Annotated[Literal["sgd", "adam"], "of the images"] = "sgd"
    lr: Annotated[float, "learning rate of the images (CIFAR-100: 1000)", Gt(0)] = 100.0
    momentum: Annotated[float, "of the images' SGD", Ge(0), Lt(1)] = 0.5
    step_size: Annotated[float, "first value of the learnt step size of students", Gt(0)] = 0.01
    step_size_lr: Annotated[float, "learning rate of the step size", Ge(0)] = 1e-5
    ema: Annotated[float, "decay of the mean of images and step size, which is the result", Ge(0), Lt(1)] = 0.9995
    compare: Annotated[bool, "also measure real images, as many and drawn at random"] = True

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = CondensationTask.prepare(self, run)
        if self.max_start + self.expert_epochs > self.epochs:
            raise ConfigError(
                f"max_start={self.max_start} and expert_epochs={self.expert_epochs} go beyond epochs={self.epochs}"
            )
        flat = partial(FlatCrossEntropy, rho=self.rho if self.flat else 0.0, alpha=self.alpha)
        expert = partial(task.expert, flat, epochs=self.epochs, lr=self.expert_lr, batch_size=self.expert_batch)
        experts: list[Artifact] = []
        for number in range(self.experts):
            experts.append((yield expert(f"expert-{number:02d}", seed=1000 * self.seed + number)))
        real = task.real_subset(seed=self.seed)
        learnt = yield self.matching(task, experts, real)
        condensed = yield Transform("condensed", partial(task.condensed_set, learnt, real))
        images = from_parquet(condensed.data_file(), task.images.classes)
        rate = condensed.json("step_size.json")
        sets = {"condensed": (images, rate)} | ({"random": (real, self.network_lr)} if self.compare else {})
        trained = yield from task.networks(sets)
        sizes = {name: len(data) for name, (data, _) in sets.items()}
        way = {"steps": self.student_steps, "epochs": self.expert_epochs, "last": self.max_start + self.expert_epochs}
        errors = partial(task.trajectory_errors, experts, images, rate, rho=self.rho, **way)
        yield task.evaluation(trained, sizes, errors)

    def matching(self, task: CondensationTask, experts: Sequence[Artifact], real: Images) -> Train:
        """The stage that learns the images, beginning with real ones: its model is the data set."""
        synthetic = SyntheticImages(real.pixels, real.labels, step_size=self.step_size)  # type: ignore[arg-type]
        observed = Observed(synthetic, name="images", call=lambda module, _: module())
        objective = TrajectoryMatching(
            observed, task.build(0), steps=self.student_steps, batch_size=self.student_batch, kinds=self.augmentation
        )
        optimizer = images_and_rate(self.optimizer, self.lr, momentum=self.momentum, rate_lr=self.step_size_lr)
        player = Player("images", observed, objective, optimizer=optimizer, ema=EMA(synthetic, self.ema))
        segment = partial(task.segment, experts, max_start=self.max_start, epochs=self.expert_epochs)
        return Train("images", player, source=Drawn(segment, seed=self.seed), steps=self.steps)

    def claims(self) -> list[Claim]:
        variants = {"ftd": ("ftd", {"compare": False}), "mtt": ("ftd", {"compare": False, "flat": False})}

        def claim(statement: str, metric: str, figure: str, *, central: bool = False) -> Claim:
            return Claim(
                statement=statement,
                metric=metric,
                method="ftd",
                baseline="mtt",
                variants=variants,
                measure=lambda artifacts: artifacts["evaluation"].metrics[f"condensed/{figure}"],
                higher_is_better=central,
                scope="central" if central else "consequence",
                seeds=3,
                budget="equal experts, epochs, learnt images, updates and fresh networks; GSAM takes two passes a step",
            )

        real = ("ftd", {"compare": True})
        return [
            claim(
                "images learnt from flat experts teach more than those learnt from plain ones",
                "accuracy of fresh networks on test images",
                "accuracy",
                central=True,
            ),
            claim(
                "over all segments, students that follow flat experts end nearer to them",
                "distance to the expert's end, over the expert's own way",
                "accumulated_error",
            ),
            claim(
                "GSAM's experts end in flatter places", "rise of the loss at the worst small step, nats", "sharpness"
            ),
            Claim(
                statement="learnt images teach more than as many real ones",
                metric="accuracy of fresh networks on test images",
                method="ftd",
                baseline="real images",
                variants={"ftd": variants["ftd"], "real images": real},
                measure=lambda artifacts: next(
                    artifacts["evaluation"].metrics[f"{name}/accuracy"]
                    for name in ("random", "condensed")
                    if f"{name}/accuracy" in artifacts["evaluation"].metrics
                ),
                higher_is_better=True,
                scope="consequence",
                seeds=3,
                budget="as many images; fresh networks, steps and batches alike",
            ),
        ]
