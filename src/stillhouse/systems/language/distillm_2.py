"""DistiLLM-2: one skewed KL draws the student to the teacher's text, the other pushes it off its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class DistiLLM2(PolicySystem):
    """DistiLLM-2 (Ko et al., ICML 2025, arXiv 2503.07067).

    The loss and the text it is taken on belong together: KL(p || skew p + (1 - skew) q) on text the teacher wrote
    raises what the teacher says, KL(q || skew q + (1 - skew) p) on text the student wrote lowers what only the student
    says. As in the authors' released settings, the skew is the same for all samples and both losses weigh the same; the
    paper's curriculum over the two is not here.
    """

    meta = Meta(
        card=151,
        title="DistiLLM-2",
        domain="language",
        family="contrastive skewed KLs on text of both sides",
        citation="Ko et al. (2025), DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs, ICML 2025, "
        "arXiv 2503.07067",
        feedback="logits",
        policy="mixed",
        elicitation=("feature", "labelling"),
        algorithm="divergence",
        stages=2,
    )
    divergence: DivergenceField = "skew-forward"
    own_divergence: OwnDivergenceField = "skew-reverse"
    skew: SkewField = 0.1
    text: TextField = "teacher"
    on_policy: ShareField = 0.5

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        arms = {
            "each on its side": common,
            "swapped": {**common, "divergence": "skew-reverse", "own_divergence": "skew-forward"},
            "one for both": {**common, "own_divergence": None},
        }
        experiment = Experiment("distillm-2", arms, "equal steps, equal text, equal students")
        statements = {
            "one for both": "a loss of its own for each side's text beats one loss for both",
            "swapped": "the skewed KLs belong where the paper puts them: swapped, they do worse",
        }
        return [
            experiment.claim(
                statement,
                "mean KL(student || teacher) per token of the student's own text, nats",
                "student/own_kl",
                "each on its side",
                baseline,
                higher_is_better=False,
                scope="central" if baseline == "one for both" else "consequence",
            )
            for baseline, statement in statements.items()
        ]
