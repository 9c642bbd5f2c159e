"""DistiLLM-2: one skewed KL draws the student to the teacher's text, the other pushes it off its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import piecewise
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.language import head_of
from stillhouse.objectives.skew_curriculum import CurriculumSkew
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.policies import (
    Divergence,
    DivergenceField,
    OwnDivergenceField,
    Policies,
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
    says. Two curricula go with it: the skew, response by response, falls where the response is easy, against the mean
    gap of the run's first part; and the two sides weigh 2 (1 - b) and 2 b, with b the share of the run that is done, at
    least ``own_weight``. The authors' code has both switched off, and another ramp (b to 3/4, in half the run).
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
        role="smaller models",
        facts=MethodFacts(),
    )
    divergence: DivergenceField = "skew-forward"
    own_divergence: OwnDivergenceField = "skew-reverse"
    skew: SkewField = 0.1
    text: TextField = "teacher"
    on_policy: ShareField = 0.5
    curriculum: Annotated[
        Literal["both", "skew", "weight", "none"], "what changes over the run: responses' skew, the sides' weight"
    ] = "both"
    least_skew: Annotated[float, "skew of the easiest responses; the hardest have skew itself", Gt(0), Lt(1)] = 0.01
    measure: Annotated[float, "share of the run with a fixed skew, in which the mean gap is measured", Ge(0), Lt(1)] = (
        1 / 3  # the first of three epochs
    )
    own_weight: Annotated[float, "curriculum of the weight: least share of the student's side in it", Gt(0), Lt(1)] = (
        0.5
    )

    def objective(self, policies: Policies, student: Observed) -> Objective:
        if self.divergence == "labels" or self.curriculum == "none":
            return super().objective(policies, student)
        adaptive = self.curriculum != "weight"
        match = partial(self._skewed, policies, student) if adaptive else self.matcher(policies, student)
        given, own = match(self.divergence, "given"), match(self.own_divergence or self.divergence, "own")
        if self.curriculum == "skew":
            return given + own
        b = self.own_weight
        return piecewise((b, 2 - 2 * b), (1.0, 0.0)) * given + piecewise((b, 2 * b), (1.0, 2.0)) * own

    def _skewed(self, policies: Policies, student: Observed, name: Divergence, rows: str) -> Objective:
        if policies.kept is not None or name not in ("skew-forward", "skew-reverse"):
            raise ConfigError(
                f"curriculum={self.curriculum} adapts skewed KLs to how likely the teacher finds whole responses: that "
                "takes its weights, and divergence and own_divergence of skew-forward or skew-reverse; or set "
                "curriculum=weight"
            )
        return CurriculumSkew(
            head_of(student),
            head_of(policies.task.observed_teacher()),
            name,
            own=rows == "own",
            rows=rows,
            until=self.measure,
            skew=self.skew,
            least=min(self.least_skew, self.skew),
            temperature=self.temperature,
            vocab_size=policies.task.vocab_size,
        )

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {"pretrain": 1.0, "epochs": 1.0}
        arms = {
            "each on its side": common,
            "swapped": {**common, "divergence": "skew-reverse", "own_divergence": "skew-forward"},
            "one for both": {**common, "own_divergence": None},
            "no curriculum": {**common, "curriculum": "none"},
        }
        experiment = Experiment("distillm-2", arms, "equal steps, equal text, equal students")
        statements = {
            "one for both": "a loss of its own for each side's text beats one loss for both",
            "swapped": "the skewed KLs belong where the paper puts them: swapped, they do worse",
            "no curriculum": "skews that follow the responses, and a rising weight of the student's side, help",
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
