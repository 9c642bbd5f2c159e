"""DDK: distillation text is drawn from the domains in which the student is furthest behind its teacher."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, cosine
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.data.domain_mixture import Discrepancy, DomainMixture
from stillhouse.losses.divergences import ForwardKL, ReverseKL
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.domains import DomainSystem, DomainTask
from stillhouse.tasks.experiments import Experiment


@dataclass(kw_only=True)
class DDK(DomainSystem):
    """DDK: distilling domain knowledge for efficient large language models (Liu et al., 2024, arXiv 2407.16154).

    Every ``interval`` steps the student's perplexities on held-out text of each domain, over the teacher's, give the
    domain discrepancy factor r <- alpha r exp(ratio) / sum + (1 - alpha) / N; rows are drawn from the domains with
    these probabilities. The loss is cross-entropy + ``gamma`` KL(teacher || student). The first interval is drawn as
    the data is.
    """

    meta = Meta(
        card=105,
        title="DDK",
        domain="language",
        family="logit KD, dynamic mixture of domains",
        citation="Liu et al. (2024), DDK: Distilling Domain Knowledge for Efficient Large Language Models, NeurIPS "
        "2024, arXiv 2407.16154",
        feedback=("logits", "data"),
        elicitation=("feature", "curation"),
        algorithm="divergence",
        stages="teacher's perplexities + 1",
        role="smaller models",
    )
    demo: ClassVar[dict[str, Any]] = {**DomainSystem.demo, "steps": 600, "interval": 50, "pretrain": 2.0}
    smoke: ClassVar[dict[str, Any]] = {
        "data": "demo",
        "validation": 0.02,
        "selection": 0.02,
        "interval": 4,
        "eval_windows": 8,
        "pretrain": 0.004,
    }

    gamma: Annotated[float, "weight of the KL beside the cross-entropy", Ge(0)] = 0.2
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 1.0
    divergence: Annotated[Literal["forward-kl", "reverse-kl"], "direction; forward has the teacher first"] = (
        "forward-kl"
    )
    mixture: Annotated[
        Literal["discrepancy", "natural", "uniform", "doremi"],
        "shares of the domains: by the factor, the data's own, equal, or those that DoReMi finds beforehand",
    ] = "discrepancy"
    alpha: Annotated[float, "share of the factor that follows the gap; the rest is spread evenly", Ge(0), Le(1)] = 0.5
    smooth: Annotated[bool, "off: no memory and no floor, r is exp(ratio) over its sum"] = True
    ratio_clip: Annotated[float, "largest ratio of perplexities that counts", Gt(0)] = 10.0
    interval: Annotated[int, "optimizer steps between looks at the student", Ge(1)] = 1000
    eval_windows: Annotated[int, "held-out sequences of a domain by which it is looked at", Ge(1)] = 500
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 3e-5
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.03

    def learning_rate(self) -> Schedule:
        """The cosine ends at a tenth of the peak."""
        return cosine(1.0, 0.1, warmup=self.warmup) if self.lr_schedule == "cosine" else super().learning_rate()

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        domains = yield from DomainTask.prepare(self, run)
        task, teacher = domains.task, head_of(domains.task.observed_teacher())
        rule, shares = None, [1.0] * len(domains.names) if self.mixture == "uniform" else domains.sizes
        if self.mixture == "doremi":
            shares = yield from domains.doremi()
        if self.mixture == "discrepancy":
            known = (yield domains.teacher_perplexities(self.eval_windows)).json()
            rule = Discrepancy(tuple(known), alpha=self.alpha, clip=self.ratio_clip, smooth=self.smooth)
        kl = ForwardKL if self.divergence == "forward-kl" else ReverseKL

        def objective(student: Observed) -> TokenMatch:
            weights: dict[str, Any] = {"divergence_weight": self.gamma, "cross_entropy": 1.0}
            divergence = kl(temperature=self.temperature, scale_by_t2=False)
            return TokenMatch(head_of(student), teacher, divergence, vocab_size=task.vocab_size, **weights)

        def source(student: Observed) -> DomainMixture:
            return domains.mixture(shares, student, every=self.interval, most=self.eval_windows, rule=rule)

        models = {"student": (yield domains.remembering(task.train("student", objective, source=source)))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield domains.evaluation(models)
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "ddk": {},
            "natural mixture": {"mixture": "natural"},
            "uniform mixture": {"mixture": "uniform"},
            "without smoothing": {"smooth": False},
            "doremi": {"mixture": "doremi"},
        }
        budget = "equal steps, batches and initial weights"
        claim = partial(Experiment("ddk", arms, budget, stage="domains").claim, higher_is_better=False)
        worst = (
            "perplexity of the student over the teacher's in its worst domain, held-out text",
            "student/worst_ratio",
        )
        mean = "log of the ratio of the perplexities, mean over the domains, held-out text", "student/mean_log_ratio"
        change = "change of the shares from one interval to the next, summed over domains", "student/weight_change"
        return [
            claim(
                "DDK brings the student nearer to its teacher than KD on the data as it is",
                *mean,
                "ddk",
                "natural mixture",
            ),
            claim("in the domain in which it is furthest behind, too", *worst, "ddk", "natural mixture"),
            claim("and than KD on as much of every domain", *mean, "ddk", "uniform mixture", scope="consequence"),
            claim("and than KD on DoReMi's mixture", *mean, "ddk", "doremi", scope="consequence"),
            claim("smoothing keeps the shares steadier", *change, "ddk", "without smoothing", scope="consequence"),
        ]
