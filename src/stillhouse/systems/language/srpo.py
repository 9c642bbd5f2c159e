"""SRPO: failed rollouts are distilled from the model's own hindsight, the others reinforced."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.base.method_facts import MethodFacts
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.ema import EMA
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.objectives.language import head_of
from stillhouse.objectives.responses import PolicyGradient, RoutedDistillation
from stillhouse.rl.hints import Hints
from stillhouse.rl.rollouts import RolloutSource
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.reasoning import Corpus, ReasoningSystem, ReasoningTask


@dataclass(kw_only=True)
class SRPO(ReasoningSystem):
    """Sample-routed policy optimisation (Li et al., 2026, arXiv 2604.02288).

    Rollouts that failed, and have a correct sibling (or the verifier's feedback), match the distribution of a
    self-teacher that reads them after that hint: an average of the policy's own weights. All others take the clipped
    group-relative loss. Tokens on which the self-teacher is uncertain count less. ``variant`` runs the two parts
    alone: GRPO, and SDPO (Huebotter et al., 2026, arXiv 2601.20802).
    """

    meta = Meta(
        card=155,
        title="SRPO",
        domain="language",
        family="on-policy self-distillation + group RL",
        citation="Li et al. (2026), Unifying Group-Relative and Self-Distillation Policy Optimization via Sample "
        "Routing, arXiv 2604.02288",
        feedback=("outcomes", "logits"),
        teacher_access="teacher-free",
        granularity="hybrid",
        policy="on-policy",
        elicitation=("feedback", "self-knowledge"),
        algorithm=("reinforcement learning", "divergence"),
        knowledge="response",
        scheme="self",
        modality="text",
        stages=1,
        role="self-improvement",
        skill="thinking patterns",
        facts=MethodFacts(
            shared_tokenizer=False,
            beside=("self-teacher",),
            reward="the verifier's, over its group's",
            divergence=("jsd beta=0.5",),
            own_text=1.0,
            sampler="student",
        ),
    )
    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "hint": "{solution}|{prompt}",
        "pretrain": 250,  # it must be right now and then, and not too often
        "prompts": 24,
        "steps": 60,
        "lr": 3e-4,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 20,
        "pretrain": 40,
        "max_new_tokens": 16,
        "prompts": 4,
        "group": 4,
        "steps": 22,
        "eval_problems": 8,
        "eval_samples": 2,
    }

    variant: Annotated[
        Literal["srpo", "grpo", "sdpo", "mix"], "routing; mix: both losses for every rollout, by the weight mix"
    ] = "srpo"
    prompts: Annotated[int, "problems in a round of rollouts", Ge(1)] = 32
    group: Annotated[int, "rollouts of each", Ge(2)] = 8
    steps: Annotated[int, "optimizer steps", Ge(1)] = 200
    minibatches: Annotated[int, "optimizer steps' batches in a round of rollouts", Ge(1)] = 1
    rollout_epochs: Annotated[int, "passes over a round of rollouts", Ge(1)] = 1
    temperature: Annotated[float, "of the rollouts", Gt(0)] = 1.0
    advantage: Annotated[Literal["group", "group-mean", "leave-one-out"], "how rewards become advantages"] = "group"
    clip_low: Annotated[float, "clips the ratio at 1 - this", Gt(0), Lt(1)] = 0.2
    clip_high: Annotated[float, "clips the ratio at 1 + this", Gt(0)] = 0.28
    ema_rate: Annotated[float, "how far the self-teacher follows the policy in a step", Gt(0), Le(1)] = 0.05
    top_k: Annotated[int, "tokens compared one by one; the others together", Ge(1)] = 100
    beta: Annotated[float, "how strongly uncertain targets fade", Ge(0)] = 1.0
    weighting: Annotated[bool, "weigh distilled tokens by the self-teacher's certainty"] = True
    ratio_limit: Annotated[float, "largest weight of a distilled token that an older policy wrote", Gt(0)] = 2.0
    mix: Annotated[float, "share of the group-relative loss in the variant mix", Ge(0), Le(1)] = 0.9
    hint: Annotated[str, "the self-teacher's prompt, with {prompt} and {solution}"] = (
        "{prompt}\n\nHere is a solution that is known to be right:\n\n{solution}\n\nNow solve the problem yourself."
    )
    feedback_hint: Annotated[str, "the same with {prompt} and {feedback}, where no sibling is right"] = (
        "{prompt}\n\nAn earlier attempt got this feedback:\n\n{feedback}\n\nNow solve the problem."
    )
    corrupt: Annotated[
        float, "share of problems with another problem's solution as their hint (a study)", Ge(0), Le(1)
    ] = 0.0
    lr: Annotated[float, "learning rate of AdamW (the paper's GRPO: 1e-6, SDPO: 1e-5)", Gt(0)] = 5e-6
    warmup_steps: Annotated[int, "steps over which it rises", Ge(0)] = 10

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        corpus = Corpus(steps=self.pretrain, short=0.3, hinted=0.5, hint=self.hint)
        task = yield from ReasoningTask.prepare(self, run, corpus)
        student = yield self._train(task)
        hinted = Column("hinted", "with a hint", ".1%", "higher", "accuracy when shown a solution before the problem")
        yield task.evaluation(
            {"base": task.base, "student": student}, more=partial(task.hinted_accuracy, self.hint), columns=[hinted]
        )

    def _train(self, task: ReasoningTask) -> Train:
        student = Observed(task.load(task.base), name="student", options={"use_cache": False})
        hints = Hints(
            task.coder, self.hint, self.feedback_hint, routing=self.variant, mix=self.mix, corrupt=self.corrupt
        )
        plain = self.variant == "grpo"
        reused = self.minibatches > 1 or self.rollout_epochs > 1
        source = RolloutSource(
            task.sampler(student.module, temperature=self.temperature, sharded=[student.tapped]),
            task.coder,
            task.train_problems,
            task.verifier,
            prompts=self.prompts,
            group=self.group,
            epochs=self.rollout_epochs,
            minibatches=self.minibatches,
            advantage=self.advantage,
            score=task.scorer(student, temperature=self.temperature) if reused else None,
            prepare=None if plain else hints,
            collate=None if plain else hints.collate,
            seed=self.seed,
        )
        teacher = None if plain else EMA(student.module, decay=1 - self.ema_rate)
        return task.train(
            "student",
            student,
            self._objective(student, teacher),
            source=source,
            steps=self.steps,
            schedule=linear(1.0, 1.0, warmup=self.warmup_steps),
            ema=teacher,
            result=student.module,
        )

    def _objective(self, student: Observed, teacher: EMA | None) -> Objective:
        common: dict[str, Any] = {
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "temperature": self.temperature,
        }
        if teacher is None:
            return PolicyGradient(head_of(student), normalisation="token", name="GroupRelative", **common)
        watcher = Observed(teacher.module, frozen=True, name="self-teacher", options={"use_cache": False})
        return RoutedDistillation(
            head_of(student),
            head_of(watcher.view("hinted")),
            top_k=self.top_k,
            beta=self.beta if self.weighting else None,
            ratio_limit=self.ratio_limit,
            **common,
        )

    def claims(self) -> list[Claim]:
        variants = {name: {"variant": name, "steps": 40} for name in ("srpo", "grpo")}
        corrupted = {"corrupt": 0.3, "steps": 40}
        weights: dict[str, dict[str, Any]] = {"weighted": corrupted, "unweighted": {**corrupted, "weighting": False}}
        budget = "equal rollouts, steps and learning rate (3e-4) from the same pre-trained policy"
        accuracy = "share of sampled answers to held-out problems that are right", "student/accuracy"
        routing = "sample routing ends with a higher accuracy than group-relative policy optimisation alone"
        weighing = "where three in ten hints belong to other problems, weighing tokens by certainty helps"
        weighed = Experiment("srpo", weights, budget)
        return [
            Experiment("srpo", variants, budget).claim(routing, *accuracy, "srpo", "grpo"),
            weighed.claim(weighing, *accuracy, "weighted", "unweighted", scope="consequence"),
        ]
