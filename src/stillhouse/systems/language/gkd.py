"""GKD: the student learns from the teacher on its own text, with a divergence between the two KLs."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.policies import DivergenceField, PolicySystem, ShareField


@dataclass(kw_only=True)
class GKD(PolicySystem):
    """Generalized knowledge distillation (Agarwal et al., ICLR 2024, arXiv 2306.13649).

    A batch is the student's own text with probability ``on_policy``, else the data's; on either, the generalised
    Jensen-Shannon divergence to the teacher, token by token, without gradients through what was sampled.
    """

    meta = Meta(
        card=151,
        title="GKD",
        domain="language",
        family="f-divergence on mixed-policy text",
        citation="Agarwal et al. (2024), On-Policy Distillation of Language Models: Learning from Self-Generated "
        "Mistakes, ICLR 2024, arXiv 2306.13649",
        feedback="logits",
        policy="mixed",
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
        facts=MethodFacts(),
    )
    divergence: DivergenceField = "jsd"
    on_policy: ShareField = 0.5

    def claims(self) -> list[Claim]:
        arms = {
            "on-policy": {"on_policy": 1.0},
            "mixed": {"on_policy": 0.5},
            "off-policy": {"on_policy": 0.0},
        }
        common = {"pretrain": 1.0, "epochs": 1.0}
        experiment = Experiment(
            "gkd", {name: {**common, **values} for name, values in arms.items()}, "equal steps from equal students"
        )
        text = {"on-policy": "its own text alone", "mixed": "its own text every other time"}
        return [
            experiment.claim(
                f"trained on {text[name]}, a student stays closer to the teacher on what it writes than one trained on "
                "the data's text",
                "mean KL(student || teacher) per token of the student's own text, nats",
                "student/own_kl",
                name,
                "off-policy",
                higher_is_better=False,
                scope="central" if name == "on-policy" else "consequence",
            )
            for name in text
        ]
