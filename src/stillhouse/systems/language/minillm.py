"""MiniLLM: the reverse KL of whole responses, by policy gradient on the student's own text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.language import head_of
from stillhouse.objectives.sequence_divergence import SequenceReverseKL
from stillhouse.tasks.experiments import Experiment
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
    importance. The cross-entropy on the data's text goes on beside it. Every response is used once, so that the ratio
    the paper clips is 1 throughout.
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
    )
    divergence: DivergenceField = "reverse-kl"
    on_policy: ShareField = 1.0
    teacher_share: TeacherShareField = 0.2
    lm_weight: LanguageLossField = 1.0
    long: Annotated[bool, "the part of the gradient that looks at what follows; off: token by token"] = True
    length_normalised: Annotated[bool, "what follows counts by its mean, not by its sum"] = True

    def objective(self, policies: Policies, student: Observed) -> Objective:
        if not self.long:
            return super().objective(policies, student)
        task = policies.task
        return SequenceReverseKL(
            head_of(student),
            head_of(task.observed_teacher()),
            teacher_share=self.teacher_share,
            length_normalised=self.length_normalised,
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
        }
        experiment = Experiment("minillm", arms, "equal steps from equal students")
        metric = "mean KL(student || teacher) per token of the student's own text, nats"
        statements = {
            "forward KL on data": "the student's own text is closer to the teacher than after forward KL on the data's",
            "no teacher mixed in": "mixing the teacher into what the student writes helps",
            "token by token": "looking at what follows helps over the reverse KL of each token alone",
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
