"""AlignDistil: alignment as distillation from a teacher that two DPO models span, token by token."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError
from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.extrapolation import Extrapolation
from stillhouse.objectives.alignment import ExtrapolatedTeacher, SequenceReward
from stillhouse.objectives.language import head_of
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.preferences import NoisyCorpus, PreferenceSystem, PreferenceTask


@dataclass(kw_only=True)
class AlignDistil(PreferenceSystem):
    """Alignment as adaptive policy distillation (Zhang et al., ACL 2025, arXiv 2503.02832).

    One copy of the model learns the preferences by DPO, another one the same preferences turned round. The policy then
    minimises beta_t KL(policy || softmax(z_dpo + alpha_t (z_dpo - z_rev))) for every token of a response: alpha_t grows
    with how far the two are apart there, and beta_t = beta0 / alpha_t.
    """

    meta = Meta(
        card=175,
        title="AlignDistil",
        domain="language",
        family="preference alignment as logit distillation",
        citation="Zhang et al. (2025), AlignDistil: Token-Level Language Model Alignment as Adaptive Policy "
        "Distillation, ACL 2025, arXiv 2503.02832",
        feedback=("preferences", "logits"),
        granularity="token",
        policy=("on-policy", "off-policy"),
        elicitation=("feedback", "feature"),
        algorithm=("ranking", "divergence"),
        scheme="self",
        stages=3,
        role="self-improvement",
        skill="preferences",
        facts=MethodFacts(
            shared_tokenizer=False,
            beside=("DPO model", "reverse DPO model"),
            reward="beta0 log p_dpo/p_reverse, token by token",
            divergence=("reverse-kl",),
            own_text=1.0,
            sampler="student",
        ),
    )
    demo: ClassVar[dict[str, Any]] = {**PreferenceSystem.demo, "ratio": 3.0, "steps": 120}
    smoke: ClassVar[dict[str, Any]] = {**PreferenceSystem.smoke, "steps": 22}

    method: Annotated[
        Literal["aligndistil", "sequence", "dpo"],
        "sequence: one reward a response instead (needs alpha); dpo: plain DPO, for comparison",
    ] = "aligndistil"
    on_policy: Annotated[bool, "learn from responses the policy writes; off: from the chosen ones"] = True
    ratio: Annotated[float, "alpha per total variation (off-policy 10); aim at a mean alpha of 0.3 to 1", Ge(0)] = 15.0
    floor: Annotated[float, "alpha where both models agree", Gt(0)] = 1e-3
    alpha_cap: Annotated[float | None, "largest alpha, against responses that run away", Gt(0)] = None
    alpha: Annotated[float | None, "alpha of all tokens instead, an ablation (2.0)", Gt(0)] = None
    beta: Annotated[float | None, "weight of all tokens instead of beta0 / alpha, an ablation", Gt(0)] = None
    contrast: Annotated[
        Literal["reverse", "reference"], "reference: no reverse model; pi* = softmax(alpha z_dpo + (1 - alpha) z_ref)"
    ] = "reverse"
    beta0: Annotated[float, "beta of both DPO stages", Gt(0)] = 0.1
    form: Annotated[
        Literal["paper", "code"], "code: total variation without its half, off-policy the tokens' own places"
    ] = "paper"
    steps: Annotated[int | None, "steps of the last stage; by default one pass", Ge(1)] = None

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        if self.method == "sequence" and (self.alpha is None or not self.on_policy):
            raise ConfigError("method=sequence needs alpha=NUMBER and on_policy=true")
        corpus = NoisyCorpus(steps=self.pretrain, batch_size=96)
        task = yield from PreferenceTask.with_pairs(self, run, corpus)
        models: dict[str, str | Artifact] = {"base": task.base}
        if self.method == "dpo":
            models["student"] = student = yield task.dpo("student", self, beta=self.beta0)
            yield task.evaluation_of(models, rewards={"dpo": (student, task.base)})
            return
        dpo = yield task.dpo("dpo", self, beta=self.beta0)
        other: str | Artifact = task.base
        models["dpo"], rewards = dpo, {"dpo": (dpo, other)}
        if self.contrast == "reverse":
            other = models["reverse"] = yield task.dpo("reverse", self, beta=self.beta0, swapped=True)
            rewards["contrast"] = (dpo, other)
        models["student"] = yield self._distil(task, dpo, other)
        yield task.evaluation_of(models, rewards=rewards)

    def _distil(self, task: PreferenceTask, dpo: Artifact, other: str | Artifact) -> Stage:
        how = Extrapolation(
            ratio=self.ratio,
            floor=self.floor,
            cap=self.alpha_cap,
            fixed=self.alpha,
            beta0=self.beta0,
            strength=self.beta,
            origin="plus" if self.contrast == "reverse" else "minus",
            halved=self.form == "paper",
        )
        student = task.policy("student")
        heads = head_of(student), head_of(task.frozen("dpo", dpo)), head_of(task.frozen("other", other))
        steps = self.steps or max(1, len(task.training) // self.batch_size)
        source = task.responses(self, student, own=self.on_policy, steps=steps)
        shifted = self.form == "paper" or self.on_policy
        whole = self.method == "sequence"
        objective = SequenceReward(*heads, how) if whole else ExtrapolatedTeacher(*heads, how, shifted=shifted)
        return task.align("student", self, student, objective, source=source, steps=steps)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "on-policy": {},
            "off-policy": {"on_policy": False},
            "far": {"ratio": 25.0},  # a mean alpha of about 2
            "fixed alpha": {"alpha": 1.0},
            "its DPO model": {"method": "dpo"},
            "DPO": {"method": "dpo", "dpo_steps": 160},
        }
        claim = Experiment("aligndistil", arms, "equal pairs, batches and learning rates").claim
        weaker = partial(claim, scope="consequence")
        score = "mean score of sampled responses, 0 to 6", "student/score"
        kl = "KL to the base model of a response, nats", "student/kl"
        too_far = "a teacher too far out (ratio 25) makes a worse policy than a near one (3)"
        close = "adaptive alpha (ratio 3) stays closer to the base model than alpha 1"
        return [
            claim("it aligns better than DPO of as many steps in all", *score, "on-policy", "DPO"),
            weaker("it is better than the DPO model it learns from", *score, "on-policy", "its DPO model"),
            weaker("so it is off-policy", *score, "off-policy", "its DPO model"),
            weaker(too_far, *score, "on-policy", "far"),
            weaker(close, *kl, "on-policy", "fixed alpha", higher_is_better=False),
        ]
