"""f-DISTILL: an f-divergence of sequences, each side of it on the text that side wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.policies import (
    DivergenceField,
    OwnDivergenceField,
    PolicySystem,
    ShareField,
    SkewField,
    TextField,
)


@dataclass(kw_only=True)
class FDistill(PolicySystem):
    """f-DISTILL (Wen et al., ACL 2023, arXiv 2307.15190).

    Sequence-level f-divergences split into tokens. With p the teacher, q the student, m their mean, the default is the
    Jensen-Shannon divergence: KL(p || m) on text the teacher wrote, KL(q || m) on text the student wrote. The others:
    ``divergence=tvd own_divergence=tvd`` (total variation, on both), ``divergence=forward-kl on_policy=0`` and
    ``own_divergence=reverse-kl on_policy=1``.
    """

    meta = Meta(
        card=151,
        title="f-DISTILL",
        domain="language",
        family="f-divergence on text of both sides",
        citation="Wen et al. (2023), f-Divergence Minimization for Sequence-Level Knowledge Distillation, ACL 2023, "
        "arXiv 2307.15190",
        feedback="logits",
        policy="mixed",
        elicitation=("feature", "labelling"),
        algorithm="divergence",
        stages=2,
        role="smaller models",
        facts=MethodFacts(),
    )
    divergence: DivergenceField = "skew-forward"  # KL(p || (p + q) / 2)
    own_divergence: OwnDivergenceField = "skew-reverse"  # KL(q || (p + q) / 2)
    skew: SkewField = 0.5
    text: TextField = "teacher"
    on_policy: ShareField = 0.5

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        arms = {
            "jensen-shannon": common,
            "total variation": {**common, "divergence": "tvd", "own_divergence": "tvd"},
            "forward": {**common, "divergence": "forward-kl", "own_divergence": None, "on_policy": 0.0},
        }
        experiment = Experiment("f-distill", arms, "equal steps from equal students")
        metric = "mean KL(student || teacher) per token of the student's own text, nats"
        return [
            experiment.claim(
                f"a symmetric loss on both sides' text ({name}) beats forward KL on the teacher's",
                metric,
                "student/own_kl",
                name,
                "forward",
                higher_is_better=False,
                scope="central" if name == "jensen-shannon" else "consequence",
            )
            for name in ("jensen-shannon", "total variation")
        ]
