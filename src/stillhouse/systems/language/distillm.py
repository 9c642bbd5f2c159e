"""DistiLLM: skewed KLs, and the student's own text used again while that does no harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.system import Claim, Meta
from stillhouse.rl.policies import AdaptiveReplay, Chooser
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.policies import DivergenceField, PolicySystem, ReplayField, ShareField


@dataclass(kw_only=True)
class DistiLLM(PolicySystem):
    """DistiLLM (Ko et al., ICML 2024, arXiv 2402.03898).

    A KL whose second side has a share ``skew`` of the first mixed in, so that it stays bounded and smooth, on the
    data's text and on the student's own: the share of its own grows whenever the held-out loss rises, and most of it
    comes from a replay buffer.
    """

    meta = Meta(
        card=151,
        title="DistiLLM",
        domain="language",
        family="skewed KL on adaptively mixed text",
        citation="Ko et al. (2024), DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024, "
        "arXiv 2402.03898",
        feedback="logits",
        policy="mixed",
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
        facts=MethodFacts(),
    )
    divergence: DivergenceField = "skew-reverse"
    replay: ReplayField = 1000
    on_policy: ShareField = 0.0
    share_step: Annotated[float, "by how much the share of own text grows", Ge(0), Le(1)] = 0.1
    margin: Annotated[float, "a rise of the held-out loss by this much counts", Ge(0)] = 0.1

    def chooser(self) -> Chooser:
        return AdaptiveReplay(self.on_policy, step=self.share_step, margin=self.margin)

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        arms = {
            "skewed reverse": common,
            "reverse": {**common, "divergence": "reverse-kl"},
            "skewed forward": {**common, "divergence": "skew-forward"},
            "forward": {**common, "divergence": "forward-kl"},
        }
        experiment = Experiment("distillm", arms, "equal steps from equal students")
        return [
            experiment.claim(
                f"with a skewed {direction} KL the student's own text is closer to the teacher than with the plain one",
                "mean KL(student || teacher) per token of the student's own text, nats",
                "student/own_kl",
                f"skewed {direction}",
                direction,
                higher_is_better=False,
            )
            for direction in ("reverse", "forward")
        ]
