"""TAID: the teacher comes closer as the student learns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import Scheduled, linear
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import InterpolatedForwardKL
from stillhouse.objectives.adaptive import MomentumRamp
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class TAID(LanguageSystem):
    """Temporally adaptive interpolated distillation (Shing et al., ICLR 2025, arXiv 2501.16937).

    The student matches p_t = softmax((1 - t) sg(student) + t teacher); t grows from ``t_start`` to ``t_end``, never
    slower than a straight line, and faster while the loss falls.
    """

    meta = Meta(
        card=48,
        title="TAID",
        domain="language",
        family="logit KD, adaptive intermediate teacher",
        citation="Shing et al. (2025), TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge "
        "Transfer in Language Models, ICLR 2025, arXiv 2501.16937",
        feedback="logits",
        elicitation="feature",
        algorithm="divergence",
        role="smaller models",
        facts=MethodFacts(drawing="nothing drawn", divergence=("forward-kl to p_t",), own_text=0.0, sampler="data"),
    )

    t_start: Annotated[float, "share of the teacher in the first target (0.2 for close pairs)", Ge(0), Le(1)] = 0.4
    t_end: Annotated[float, "share of the teacher in the last target", Ge(0), Le(1)] = 1.0
    alpha: Annotated[float, "size of the adaptive steps of t", Ge(0)] = 5e-4
    beta: Annotated[float, "momentum of the loss's relative change", Ge(0), Lt(1)] = 0.99
    adaptive: Annotated[bool, "let the loss drive t; off: t follows the straight line"] = True
    epochs: Annotated[float, "passes over the data", Gt(0)] = 5.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        teacher = head_of(task.observed_teacher())

        def objective(student: Observed) -> TokenMatch:
            t: Scheduled = (
                MomentumRamp(self.t_start, self.t_end, alpha=self.alpha, beta=self.beta)
                if self.adaptive
                else linear(self.t_start, self.t_end)
            )
            divergence = InterpolatedForwardKL(t=self.t_start)
            return TokenMatch(head_of(student), teacher, divergence, t=t, vocab_size=task.vocab_size, name="TAID")

        models = {"student": (yield task.train("student", objective))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        # A student of a tenth of the teacher's size that has read the text once: TAID's targets contain the student's
        # own logits, so it has to begin with a student that knows something, as the paper's pre-trained ones do.
        common = {"student": "scale:0.1", "pretrain": 1.0, "epochs": 3.0, "baseline": False}
        variants = {
            "taid": ("taid", common),
            "forward KL": ("kd", {**common, "alpha": 1.0, "temperature": 1.0}),
            "linear t": ("taid", {**common, "adaptive": False}),
        }
        central = Claim(
            statement="across a capacity gap, TAID trains a better student than forward KL to the teacher",
            metric="loss on held-out text, nats per token",
            method="taid",
            baseline="forward KL",
            variants={name: variants[name] for name in ("taid", "forward KL")},
            measure=lambda artifacts: artifacts["evaluation"].metrics["student/val_loss"],
            higher_is_better=False,
            budget="equal pre-trained students, steps, batches and learning rates",
        )
        ablation = replace(
            central,
            statement="letting the loss drive t is better than a straight line",
            baseline="linear t",
            variants={name: variants[name] for name in ("taid", "linear t")},
        )
        return [central, ablation]
