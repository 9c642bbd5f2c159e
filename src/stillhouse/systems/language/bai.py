"""BAI: reinforcement of a reasoning model starts from a balanced merge."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.rlhf import Family, RLHFSystem, Style


@dataclass(kw_only=True)
class BAI(RLHFSystem):
    """Balanced actor initialisation (Zheng et al., 2025, arXiv 2509.00309).

    A model that was distilled on long reasoning is merged with an instruction-tuned sibling, then with their common
    ancestor: W = alpha (share W_IT + (1 - share) W_DR) + (1 - alpha) W_0. The merge is the actor that PPO starts from,
    and its reference. ``alpha=1 share=0`` reinforces the reasoning model itself, ``alpha=1 share=1`` the instructed
    one; ``share=0`` leaves out the sibling.
    """

    meta = Meta(
        card=30,
        title="BAI",
        domain="language",
        family="weight merging as initialisation of RL",
        citation="Zheng et al. (2025), Balanced Actor Initialization: Stable RLHF Training of Distillation-Based "
        "Reasoning Models, arXiv 2509.00309",
        feedback="outcomes",
        teacher_access="teacher-free",
        granularity=("sequence", "model"),
        policy="on-policy",
        elicitation="feedback",
        algorithm="reinforcement learning",
        knowledge="response",
        scheme="offline",
        modality="text",
        stages=2,
        role="self-improvement",
        skill=("thinking patterns", "preferences"),
    )
    demo: ClassVar[dict[str, Any]] = {**RLHFSystem.demo, "pretrain": 1200}
    smoke: ClassVar[dict[str, Any]] = {**RLHFSystem.smoke, "tune_instruct": 8, "tune_reasoning": 8}

    instruct: Annotated[str, "the instruction-tuned model: directory or hub id; 'demo': a tiny one"] = "demo"
    reasoning: Annotated[str, "the model distilled on reasoning: directory or hub id; 'demo': a tiny one"] = "demo"
    share: Annotated[float, "share of the instruction-tuned model in the first merge", Ge(0), Le(1)] = 0.5
    alpha: Annotated[float, "share of the first merge in the second; the rest is the ancestor", Ge(0), Le(1)] = 0.6
    sweep: Annotated[tuple[float, ...], "values of alpha to try (0.4,0.5,0.6,0.8); the best takes alpha's place"] = ()
    sweep_steps: Annotated[int, "optimizer steps of each try", Ge(1)] = 50
    dtype: Annotated[str | None, "of the merged weights (bfloat16, ...); by default the ancestor's"] = None
    special_tokens: Annotated[bool, "refuse to merge models whose added tokens differ"] = True
    tune_instruct: Annotated[int, "steps that make the embedded instruction-tuned model", Ge(1)] = 150
    tune_reasoning: Annotated[int, "steps that make the embedded reasoning model", Ge(1)] = 300
    tune_lr: Annotated[float, "peak learning rate of both", Gt(0)] = 1e-3

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        tuning: dict[Style, int] = {"instruct": self.tune_instruct, "reasoning": self.tune_reasoning}
        given = {"instruct": self.instruct, "reasoning": self.reasoning}
        family = yield from Family.prepare(self, run, **given, tuning=tuning, lr=self.tune_lr)
        merged = partial(family.merged, share=self.share, dtype=self.dtype, special_tokens=self.special_tokens)
        alpha, worth = self.alpha, float("-inf")
        runs: dict[str, Artifact] = {}
        problems = family.set_aside() if self.sweep else None
        for value in self.sweep:
            start = yield merged(f"merged-{value:g}", alpha=value)
            name = f"alpha-{value:g}"
            runs[name] = tried = yield family.reinforced(name, start, steps=self.sweep_steps, problems=problems)
            if (found := tried.metrics["accuracy"] - family.stable(tried).dip) > worth:
                alpha, worth = value, found
        actor = yield merged("merged", alpha=alpha)
        runs["student"] = yield family.reinforced("student", actor, steps=self.steps)
        yield family.stability(runs)
        relatives = {"ancestor": family.task.base, "instruct": family.instruct, "reasoning": family.reasoning}
        yield family.evaluation({**relatives, "merged": actor, "student": runs["student"]})

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "bai": {},
            "reasoning": {"share": 0.0, "alpha": 1.0},
            "two-way": {"share": 0.0},
            "ancestor": {"alpha": 0.0, "steps": 2},  # only the merge is looked at
        }
        budget = "equal rollouts, steps and learning rates"
        course = Experiment("bai", arms, budget, stage="stability").claim
        model = partial(Experiment("bai", arms, budget).claim, scope="consequence")
        dip = "fall of the mean reward below the first round's", "student/dip"
        collapse = "shortest mean length of the first 50 rounds / first one", "student/collapse"
        final = "mean reward of the last tenth of rounds", "student/final_reward"
        right = "share of sampled answers to held-out problems that are right", "student/accuracy"
        traces = "loss on held-out reasoning traces, nats per token", "merged/trace_loss"
        return [
            course(
                "the reward dips less than from the reasoning model", *dip, "bai", "reasoning", higher_is_better=False
            ),
            course("and responses collapse less", *collapse, "bai", "reasoning"),
            course("two merges are steadier than one with the ancestor alone", *collapse, "bai", "two-way"),
            course("it ends with a higher reward", *final, "bai", "reasoning", scope="consequence"),
            model("and is right more often", *right, "bai", "reasoning"),
            model("merging keeps knowledge of traces", *traces, "bai", "ancestor", higher_is_better=False),
        ]
