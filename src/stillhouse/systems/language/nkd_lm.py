"""NKD for language models: the next token's probability and the shares of the others are matched apart."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import RowDivergence
from stillhouse.losses.target_split import DKD, NKD
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class NKDLanguage(LanguageSystem):
    """Normalised knowledge distillation (Yang et al., ICCV 2023, arXiv 2303.13005), token by token.

    The paper's loss for classifiers with the next token as the label: cross-entropy - p_y log q_y - gamma T^2 sum over
    the other tokens of p^ log q^, where p^ and q^ are probabilities given that the token is not the right one.
    ``loss=dkd`` is decoupled KD (Zhao et al., CVPR 2022, arXiv 2203.08679).
    """

    meta = Meta(
        card=97,
        title="NKD for language models",
        domain="language",
        family="logit KD, target and renormalised non-targets apart",
        citation="Yang et al. (2023), From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach "
        "with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005",
        feedback=("logits", "labels"),
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
    )

    gamma: Annotated[float, "weight of the other tokens", Ge(0)] = 1.5
    temperature: Annotated[float, "softens the other tokens (dkd: all)", Gt(0)] = 1.0
    weight: Annotated[float, "of the distillation loss", Ge(0)] = 1.0
    cross_entropy: Annotated[float, "weight of the text's own tokens", Ge(0)] = 1.0
    loss: Annotated[Literal["nkd", "dkd"], "NKD, or decoupled KD"] = "nkd"
    dkd_alpha: Annotated[float, "weight of the next token against all others in loss=dkd", Ge(0)] = 1.0
    dkd_beta: Annotated[float, "weight of the other tokens in loss=dkd", Ge(0)] = 0.5

    def divergence(self) -> RowDivergence:
        """What is minimised beside the cross-entropy."""
        if self.loss == "dkd":
            return DKD(alpha=self.dkd_alpha, beta=self.dkd_beta, temperature=self.temperature)
        return NKD(gamma=self.gamma, temperature=self.temperature)

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        teacher = head_of(task.observed_teacher())
        stage = task.train(
            "student",
            lambda student: TokenMatch(
                head_of(student),
                teacher,
                self.divergence(),
                divergence_weight=self.weight,
                cross_entropy=self.cross_entropy,
                vocab_size=task.vocab_size,
            ),
        )
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"steps": 120, "student": "scale:0.1", "baseline": False}
        variants = {
            "nkd": ("nkd-lm", common),
            "kd": ("kd", {**common, "alpha": 0.5, "temperature": 1.0}),
            "text alone": ("nkd-lm", {**common, "weight": 0.0}),
        }

        def claim(statement: str, baseline: str, scope: Literal["central", "consequence"]) -> Claim:
            return Claim(
                statement=statement,
                metric="loss on held-out text after 120 steps, nats per token",
                method="nkd",
                baseline=baseline,
                variants=variants,
                measure=lambda artifacts: artifacts["evaluation"].metrics["student/val_loss"],
                higher_is_better=False,
                scope=scope,
                seeds=3,
                budget="equal teacher, steps, batches, learning rates and initial weights",
            )

        return [
            claim("NKD makes a better language model than KD", "kd", "central"),
            claim("NKD makes a better language model than the text alone", "text alone", "consequence"),
        ]
