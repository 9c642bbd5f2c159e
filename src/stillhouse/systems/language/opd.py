"""The whole family of on-policy distillation in one configurable system, and what it is for: exposure bias."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from stillhouse.base.method_facts import MethodFacts
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.corrective_walk import NOISES, CorrectiveWalk, excess_error, exposure
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageTask
from stillhouse.tasks.policies import DivergenceField, PolicySystem, ShareField


@dataclass(kw_only=True)
class OnPolicyDistillation(PolicySystem):
    """On-policy distillation, after its survey (Song and Zheng, 2026, arXiv 2604.00626; card 151).

    Any divergence on any mixture of the data's, the teacher's and the student's own text. Off the teacher's path a
    student that has seen nothing else errs on, O(eps T^2) in all, against O(eps T) for one that was corrected there.
    The embedded task is a walk on which mistakes can be made good.
    """

    meta = Meta(
        card=151,
        title="On-policy distillation",
        domain="language",
        family="f-divergence on mixed-policy text",
        citation="Song and Zheng (2026), A Survey of On-Policy Distillation for Large Language Models, "
        "arXiv 2604.00626",
        feedback="logits",
        policy=("off-policy", "on-policy", "mixed"),
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
        facts=MethodFacts(),
    )
    demo: ClassVar[dict[str, Any]] = {
        "batch_size": 64,
        "pretrain": 6.25,  # 400 steps on the expert's walks
        "steps": 400,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "weight_decay": 0.0,
        "new_tokens": 8,
    }

    divergence: DivergenceField = "reverse-kl"
    on_policy: ShareField = 1.0

    def prepared(self, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
        return (yield from (CorrectiveWalk if self.is_demo() else LanguageTask).prepare(self, run))

    def measured(self, task: LanguageTask, model: Any) -> dict[str, float]:
        if not self.is_demo():
            return {}
        return {**exposure(model, seed=self.seed), **excess_error(model, seed=self.seed)}

    def columns(self) -> list[Column]:
        pushed = "expert's moves, of the last three, after positions were replaced with this probability"
        walk = [Column(f"right_{noise:g}", f"pushed {noise:g}", ".1%", "higher", pushed) for noise in NOISES]
        return [*super().columns(), *(walk if self.is_demo() else [])]

    def claims(self) -> list[Claim]:
        arms = {
            "on-policy forward KL": {"divergence": "forward-kl", "on_policy": 1.0},
            "on-policy reverse KL": {"divergence": "reverse-kl", "on_policy": 1.0},
            "off-policy forward KL": {"divergence": "forward-kl", "on_policy": 0.0},
            "text alone": {"divergence": "labels", "on_policy": 0.0},
        }
        experiment = Experiment("opd", arms, "400 steps from students of 400 steps on the expert's text")
        pairs = [
            ("on-policy forward KL", "off-policy forward KL"),
            ("on-policy reverse KL", "off-policy forward KL"),
            ("off-policy forward KL", "text alone"),
        ]
        return [
            experiment.claim(
                f"after {method} a student errs less where it was pushed off the path than after {baseline}",
                "share of moves that are the expert's, a fifth of earlier positions replaced",
                "student/right_0.2",
                method,
                baseline,
                scope="consequence" if number else "central",
            )
            for number, (method, baseline) in enumerate(pairs)
        ]
