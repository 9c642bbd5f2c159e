"""DMD2: a generator of few steps that follows a teacher's score, a critic that follows the generator, and a GAN."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.ema import EMA
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.diffusion.samplers import FewStepGenerator
from stillhouse.objectives.diffusion import (
    Denoising,
    DiscriminatorGAN,
    DistributionMatching,
    GeneratorGAN,
    at_noise,
)
from stillhouse.tasks.diffusion import DiffusionSystem, DiffusionTask
from stillhouse.tasks.experiments import Experiment


@dataclass(kw_only=True)
class DMD2(DiffusionSystem):
    """Improved distribution matching distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867).

    The generator's samples move along the difference of two scores, the guided teacher's and a critic's. The critic is
    trained on the generator's samples in every step, the generator in every ``critic_steps``-th. A discriminator on the
    critic's features, at all levels of noise, brings in real data. A generator of several steps is trained on inputs
    that it made itself.
    """

    meta = Meta(
        card=66,
        title="DMD2",
        domain="diffusion",
        family="score distillation and GAN, few steps",
        citation="Yin et al. (2024), Improved Distribution Matching Distillation for Fast Image Synthesis, NeurIPS "
        "2024, arXiv 2405.14867",
        feedback=("scores", "data"),
        granularity="sample",
        policy="on-policy",
        algorithm=("divergence", "adversarial"),
        knowledge=("score", "data"),
        scheme="online",
        modality="image",
        stages="1 to 3",
        role="compression",
    )
    demo: ClassVar = {
        "student_steps": 4,
        "steps": 3000,
        "batch_size": 128,
        "lr": 2e-4,
        "critic_lr": 1e-3,
        "beta1": 0.0,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "warmup": 0,
        "ema": 0.99,
    }
    smoke: ClassVar = {
        "demo_steps": 20,
        "steps": 22,
        "batch_size": 16,
        "critic_steps": 2,
        "student_steps": 2,
        "score_steps": 12,
        "regression_steps": 4,
        "teacher_steps": 4,
        "eval_samples": 128,
    }

    student_steps: Annotated[int, "network calls of the student (1 ImageNet; 4 SDXL)", Ge(1)] = 1
    first_timestep: Annotated[int | None, "time a student of one step is told (399 SDXL)", Ge(0)] = None
    critic_steps: Annotated[int, "critic updates for one of the generator (10 for SD 1.5; 1 is DMD's)", Ge(1)] = 5
    simulate: Annotated[bool, "train on inputs the student made itself; off: on noised data"] = True
    gan: Annotated[bool, "the GAN on real data; off: scores alone"] = True
    gan_weight: Annotated[float, "of the GAN in the generator (1e-3 SD 1.5, 5e-3 SDXL)", Ge(0)] = 3e-3
    critic_gan_weight: Annotated[float, "of the GAN in the critic", Ge(0)] = 1e-2
    gan_noise: Annotated[float, "share of the schedule, from its clean end, that the GAN sees", Gt(0), Le(1)] = 1.0
    min_noise: Annotated[float, "where on the schedule scores are compared: from", Ge(0), Le(1)] = 0.02
    max_noise: Annotated[float, "and to", Ge(0), Le(1)] = 0.98
    guidance: Annotated[float, "of the teacher alone (1.75 SD 1.5, 8 SDXL)", Ge(0)] = 1.0
    lora_rank: Annotated[int | None, "of adapters, trained in place of the generator (64 SDXL)", Ge(1)] = None
    lora_alpha: Annotated[float, "adapters count alpha / rank times", Gt(0)] = 8.0
    critic_lr: Annotated[float | None, "learning rate of the critic; by default the generator's", Gt(0)] = None
    score_steps: Annotated[int, "steps before the GAN joins in, as a stage of their own; 0: none", Ge(0)] = 0
    score_lr: Annotated[float | None, "learning rate of that stage; by default lr", Gt(0)] = None
    regression_steps: Annotated[int, "steps of regression on teacher samples before all else", Ge(0)] = 0
    regression_ode_steps: Annotated[int, "DDIM steps of those teacher samples", Ge(1)] = 20
    steps: Annotated[int, "critic updates of the main training", Ge(1)] = 100_000
    batch_size: Annotated[int, "samples in a batch, all processes together", Ge(1)] = 280
    lr: Annotated[float, "learning rate of the generator (AdamW; 5e-7 SDXL)", Gt(0)] = 2e-6
    warmup: Annotated[int, "steps over which the learning rates rise", Ge(0)] = 500
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 10.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from DiffusionTask.prepare(self, run)
        before: Artifact | None = None
        if self.regression_steps:
            steps, model = self.regression_steps, self._generator(task, None)
            before = yield task.regression("regression", model, steps=steps, ode_steps=self.regression_ode_steps)
        if self.score_steps:
            lr = self.score_lr or self.lr
            before = yield self._matching("scores", task, before, gan=False, steps=self.score_steps, lr=lr)
        student = yield self._matching("student", task, before, gan=self.gan, steps=self.steps, lr=self.lr)
        yield task.evaluation({"student": student})

    def _generator(self, task: DiffusionTask, before: Artifact | None) -> FewStepGenerator:
        lora = None if self.lora_rank is None else (self.lora_rank, self.lora_alpha)
        return task.new_generator(self.student_steps, first_timestep=self.first_timestep, before=before, lora=lora)

    def _matching(
        self, name: str, task: DiffusionTask, before: Artifact | None, *, gan: bool, steps: int, lr: float
    ) -> Train:
        """The players: generator and critic, with the discriminator on the critic's features where there is a GAN."""
        process = task.teacher.process
        model, tracker = self._generator(task, before), task.new_critic(before)
        generator, critic = Observed(model, name="generator"), Observed(tracker, name="critic")
        sample = generator.output()
        noise = {"matching": (self.min_noise, self.max_noise), "tracking": (0.0, 1.0)}
        follow: Objective = DistributionMatching(
            sample,
            fake=at_noise(critic, process, "matching", x=sample.detach()).output(),
            real=at_noise(task.observed_teacher(), process, "matching", x=sample.detach()).output(),
        )
        tracked = at_noise(critic, process, "tracking", x=sample.detach()).output()
        track: Objective = Denoising(tracked, x=sample, level="tracking", denoiser=tracker)
        critics = [critic]
        if gan:
            noise |= {"gan": (0.0, self.gan_noise), "gan_real": (0.0, self.gan_noise)}
            seen = {
                "fooling": at_noise(critic, process, "gan", x=sample),
                "fake": at_noise(critic, process, "gan", x=sample.detach()),
                "real": at_noise(critic, process, "gan_real"),
            }
            head = Observed(task.discriminator(tracker), name="discriminator")
            logits = {
                side: head.view(side, feed={"inputs": task.features(view)}).output() for side, view in seen.items()
            }
            follow = follow + self.gan_weight * GeneratorGAN(logits["fooling"])
            track = track + self.critic_gan_weight * DiscriminatorGAN(logits["real"], logits["fake"])
            critics.append(head)
        ema = EMA(model, self.ema) if self.ema else None
        players = [
            task.player("generator", generator, follow, lr=lr, every=self.critic_steps, ema=ema),
            task.player("critic", critics, track, lr=self.critic_lr or lr),
        ]
        source = task.batches(noise, steps=self.student_steps, noised_data=not self.simulate)
        return task.train_generator(name, players, source=source, steps=steps, critic=tracker)

    def claims(self) -> list[Claim]:
        # A critic too slow for its generator: what the rule of two time scales is for.
        slow = {"student_steps": 1, "gan": False, "lr": 5e-4, "critic_lr": 1e-4, "ema": 0.0}
        # A teacher whose modes are too broad by a factor of 2.5; the GAN alone sees the real data.
        biased = {"teacher": "demo:broad-eight-gaussians", "student_steps": 1, "critic_steps": 2, "steps": 2000}
        alone = {"gan": False, "steps": 1500}
        arms: dict[str, dict[str, Any]] = {
            "5 critic updates": {**slow, "critic_steps": 5, "steps": 5000},
            "1 critic update": {**slow, "critic_steps": 1, "steps": 1000},
            "with GAN": {**biased, "gan_weight": 1.0, "critic_gan_weight": 0.3},
            "scores alone": {**biased, "gan": False},
            "own inputs": alone,
            "noised data": {**alone, "simulate": False},
        }

        def claim(statement: str, budget: str, method: str, baseline: str) -> Claim:
            metric, figure = "sliced Wasserstein distance to real data", "student/swd"
            experiment = Experiment("dmd2", arms, f"equal {budget}, initial weights, batches and learning rates")
            return experiment.claim(statement, metric, figure, method, baseline, higher_is_better=False)

        return [
            claim(
                "without a regression loss, several critic updates for one of the generator keep it from going astray",
                "generator updates (1,000)",
                "5 critic updates",
                "1 critic update",
            ),
            claim(
                "a GAN on real data lets the student be better than the scores of a wrong teacher allow",
                "teachers and steps",
                "with GAN",
                "scores alone",
            ),
            claim(
                "a student of four steps does better when trained on its own intermediate samples than on noised data",
                "steps",
                "own inputs",
                "noised data",
            ),
        ]
