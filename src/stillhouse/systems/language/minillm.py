"""MiniLLM: the reverse KL of whole responses, by policy gradient on the student's own text."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.language import head_of
from stillhouse.objectives.sequence_divergence import SequenceReverseKL
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageTask, endpoint_of
from stillhouse.tasks.policies import (
    DivergenceField,
    LanguageLossField,
    Policies,
    PolicySystem,
    ShareField,
    TeacherShareField,
)


@dataclass(kw_only=True)
class MiniLLM(PolicySystem):
    """MiniLLM (Gu et al., ICLR 2024, arXiv 2306.08543).

    The student writes, each token drawn with a share of the teacher mixed in; the gradient of the sequences' reverse KL
    is split into the exact one of every token and a length-normalised policy gradient for what follows, both weighed by
    importance. ``rollouts`` responses are written at one time and used ``inner_epochs`` times, with PPO's clip on how
    much likelier the student finds a token by then. The cross-entropy on text of ``lm_data`` goes on beside it. As the
    student's text is new in every round, there is nothing of the teacher to keep on disk; one behind an endpoint is
    asked for its ``teacher_topk`` likeliest tokens.
    """

    meta = Meta(
        card=151,
        title="MiniLLM",
        domain="language",
        family="sequence-level reverse KL, on-policy",
        citation="Gu et al. (2024), MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, "
        "arXiv 2306.08543",
        feedback="logits",
        granularity="hybrid",
        policy="on-policy",
        elicitation="feature",
        algorithm=("divergence", "reinforcement learning"),
        role="smaller models",
        facts=MethodFacts(drawing="likelihood ratio", reward="log p/q of what follows, length-normalised"),
    )
    divergence: DivergenceField = "reverse-kl"
    on_policy: ShareField = 1.0
    teacher_share: TeacherShareField = 0.2
    lm_weight: LanguageLossField = 1.0
    long: Annotated[bool, "the part of the gradient that looks at what follows; off: token by token"] = True
    length_normalised: Annotated[bool, "what follows counts by its mean, not by its sum"] = True
    rollouts: Annotated[int, "responses written at one time; at least a batch", Ge(1)] = 256
    inner_epochs: Annotated[int, "passes over them before new ones are written", Ge(1)] = 4
    clip_ratio: Annotated[float | None, "clips the policy's ratio at 1 +- this; none: no clip", Gt(0), Lt(1)] = 0.2

    demo: ClassVar[dict[str, Any]] = {**PolicySystem.demo, "rollouts": 32}  # four batches, as in the paper
    smoke: ClassVar[dict[str, Any]] = {**PolicySystem.smoke, "rollouts": 8, "inner_epochs": 2}

    def prepared(self, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
        if endpoint_of(self.teacher):
            if not self.long or self.on_policy != 1:
                raise ConfigError(
                    "teacher behind an endpoint: set long=true on_policy=1; what else you want is gkd "
                    "divergence=reverse-kl with on_policy from 0 to 1"
                )
            if self.teacher_share:
                raise ConfigError("teacher behind an endpoint: it cannot write along; set teacher_share=0")
        elif self.on_policy and self.teacher_topk is not None:
            raise ConfigError(
                "teacher_topk: the student's text is new in every round, so nothing of the teacher can be kept; leave "
                "it out"
            )
        return (yield from super().prepared(run))

    def source(self, policies: Policies, student: Observed) -> Any:
        once = self.inner_epochs == 1 and self.rollouts <= self.batch_size and policies.scorer is None
        if once or not self.on_policy:
            return super().source(policies, student)
        if self.on_policy < 1:
            raise ConfigError("on_policy below 1: nothing is used again there; set inner_epochs=1 rollouts=1")
        return policies.in_rounds(student, rollouts=self.rollouts, times=self.inner_epochs)

    def objective(self, policies: Policies, student: Observed) -> Objective:
        if not self.long:
            return super().objective(policies, student)
        task = policies.task
        return SequenceReverseKL(
            head_of(student),
            head_of(task.observed_teacher()) if policies.scorer is None else None,
            teacher_share=self.teacher_share,
            length_normalised=self.length_normalised,
            clip=self.clip_ratio,
            vocab_size=task.vocab_size,
        )

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        off = {"divergence": "forward-kl", "long": False, "on_policy": 0.0, "teacher_share": 0.0, "lm_weight": 0.0}
        arms = {
            "minillm": common,
            "forward KL on data": {**common, **off},
            "no teacher mixed in": {**common, "teacher_share": 0.0},
            "token by token": {**common, "long": False},
            "no clip": {**common, "clip_ratio": None},
        }
        experiment = Experiment("minillm", arms, "equal steps from equal students")
        metric = "mean KL(student || teacher) per token of the student's own text, nats"
        statements = {
            "forward KL on data": "the student's own text is closer to the teacher than after forward KL on the data's",
            "no teacher mixed in": "mixing the teacher into what the student writes helps",
            "token by token": "looking at what follows helps over the reverse KL of each token alone",
            "no clip": "clipping the ratio helps where every response is used four times",
        }
        return [
            experiment.claim(
                statement,
                metric,
                "student/own_kl",
                "minillm",
                baseline,
                higher_is_better=False,
                scope="central" if baseline == "forward KL on data" else "consequence",
            )
            for baseline, statement in statements.items()
        ]
