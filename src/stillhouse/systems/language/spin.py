"""SPIN: a model plays against the one it was, until what it writes cannot be told from the data."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.self_play import Pair, SelfPlaySystem, SelfPlayTask


@dataclass(kw_only=True)
class SPIN(SelfPlaySystem):
    """Self-play fine-tuning (Chen et al., ICML 2024, arXiv 2401.01335).

    In every iteration the opponent, which is the model the last one left, answers the data's prompts. The player begins
    as the opponent and minimises log(1 + exp(-beta [log p/p_opp (data's response) - log p/p_opp (opponent's)])). There
    is no teacher and no preference: the data's responses count as the better ones. Once the opponent writes as the data
    do, nothing is left to learn. Learning rates and betas are those the authors' scripts give iteration by iteration;
    their optimizer is RMSProp, here it is AdamW.
    """

    meta = Meta(
        card=151,
        title="SPIN",
        domain="language",
        family="self-play fine-tuning",
        citation="Chen et al. (2024), Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models, "
        "ICML 2024, arXiv 2401.01335",
        feedback="self-play",
        teacher_access="teacher-free",
        granularity="sequence",
        policy="mixed",
        elicitation="self-knowledge",
        algorithm="ranking",
        scheme="self",
        stages=8,
        skill="instruction following",
        role="self-improvement",
        facts=MethodFacts(
            shared_tokenizer=False,
            beside=("opponent",),
            reward="beta log p/p_opponent, data's over own",
            own_text=0.5,
            sampler="data | the last iteration's model",
        ),
    )
    demo: ClassVar[dict[str, Any]] = {**SelfPlaySystem.demo, "iterations": 3}
    smoke: ClassVar[dict[str, Any]] = {**SelfPlaySystem.smoke, "iterations": 2}

    iterations: Annotated[int, "opponents, one after the other", Ge(1)] = 4
    method: Annotated[Literal["spin", "sft"], "sft: as many further steps of fine-tuning instead, for comparison"] = (
        "spin"
    )

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from SelfPlayTask.begin(self, run)
        models: dict[str, str | Artifact] = {"base": task.base}
        model: str | Artifact = task.base
        if self.sft_steps:
            model = models["fine-tuned"] = yield task.fine_tune("fine-tuned", self, model, steps=self.sft_steps)
        if self.method == "sft":
            steps = sum(task.steps_of(self, t) for t in range(self.iterations))
            models["student"] = yield task.fine_tune("student", self, model, steps=steps)
            yield task.evaluation_of(models, rewards={})
            return
        played: list[list[Pair]] = []
        for t in range(self.iterations):
            played.append(task.pairs_of((yield task.write(f"opponent-{t}", self, model, iteration=t))))
            name = "student" if t == self.iterations - 1 else f"iteration-{t}"
            pairs = [pair for one in played[-1 - self.carried :] for pair in one]
            beta, lr = self.beta if t < 3 else self.late_beta, self.lr if t < 2 else self.late_lr
            steps = task.steps_of(self, t)
            model = models[name] = yield task.play(name, self, model, pairs, beta=beta, lr=lr, steps=steps)
        yield task.evaluation_of(models, rewards={})

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "self-play": {},
            "more fine-tuning": {"method": "sft"},
            "first iteration": {"iterations": 1},
            "one opponent": {"iterations": 1, "steps": 120},
        }
        budget = "equal data, base models and fine-tuning; 120 further steps (first iteration: 40)"
        claim = Experiment("spin", arms, budget).claim
        score = "mean score of sampled responses, 0 to 6", "student/score"
        return [
            claim(
                "self-play writes better than as many more steps of fine-tuning",
                *score,
                "self-play",
                "more fine-tuning",
            ),
            claim(
                "the last iteration writes better than the first",
                *score,
                "self-play",
                "first iteration",
                scope="consequence",
            ),
            claim(
                "a new opponent in every iteration is worth more than as many steps against the first",
                *score,
                "self-play",
                "one opponent",
                scope="consequence",
            ),
        ]
