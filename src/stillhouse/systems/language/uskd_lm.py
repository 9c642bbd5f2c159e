"""USKD for language models: a model makes its own soft next tokens, from its certainty and a ranking of the others."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.language import head_of
from stillhouse.objectives.self_targets import TokenSelfTargets, token_feature
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class USKDLanguage(LanguageSystem):
    """Universal self-knowledge distillation (Yang et al., ICCV 2023, arXiv 2303.13005), token by token.

    The paper's losses for classifiers with the next token as the label, and a linear head over the vocabulary on the
    output of a middle layer, which is dropped in the end. There is no teacher: ``teacher`` brings the tokenizer and the
    architecture that ``student`` scales, and stands beside the result in the final table.
    """

    meta = Meta(
        card=97,
        title="USKD for language models",
        domain="language",
        family="self-distillation, customised soft labels",
        citation="Yang et al. (2023), From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach "
        "with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005",
        feedback=("logits", "labels"),
        teacher_access="teacher-free",
        elicitation="self-knowledge",
        algorithm="divergence",
        scheme="self",
        role="self-improvement",
    )
    demo: ClassVar = {**LanguageSystem.demo, "student": "scale:0.25", "alpha": 0.1, "mu": 0.1}
    smoke: ClassVar = {"student": "layers=2,hidden_size=8"}

    alpha: Annotated[float, "weight of the smoothed target", Ge(0)] = 1.0
    beta: Annotated[float, "weight of the ranked other tokens", Ge(0)] = 0.1
    mu: Annotated[float, "weight of the inner head's own loss", Ge(0)] = 0.005
    layer: Annotated[int | None, "layer whose output the inner head reads; by default half-way up", Ge(1)] = None
    weak_smoothing: Annotated[float, "label smoothing of the inner head", Ge(0), Lt(1)] = 0.1

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)

        def objective(student: Observed) -> TokenSelfTargets:
            return TokenSelfTargets(
                head_of(student),
                token_feature(student, self.layer),
                width=student.module.config.hidden_size,  # type: ignore[union-attr, arg-type]
                vocab_size=task.vocab_size,
                a=self.alpha,
                b=self.beta,
                mu=self.mu,
                smoothing=self.weak_smoothing,
            )

        models = {"student": (yield task.train("student", objective))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"steps": 120, "student": "scale:0.1", "baseline": False}
        return [
            Claim(
                statement="its own soft labels make a language model better than the text alone",
                metric="loss on held-out text after 120 steps, nats per token",
                method="uskd",
                baseline="text alone",
                variants={
                    "uskd": ("uskd-lm", common),
                    "text alone": ("uskd-lm", {**common, "alpha": 0.0, "beta": 0.0, "mu": 0.0}),
                },
                measure=lambda artifacts: artifacts["evaluation"].metrics["student/val_loss"],
                higher_is_better=False,
                scope="consequence",
                seeds=3,
                budget="equal steps, batches, learning rates and initial weights",
            )
        ]
