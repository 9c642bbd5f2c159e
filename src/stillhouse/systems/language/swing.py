"""Swing distillation: the more private a token, the less its target says."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.tempered import Shape
from stillhouse.objectives.language import head_of
from stillhouse.objectives.private import SwingTokens
from stillhouse.tasks.concentrated import tuned
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.privacy import PrivacySystem, given_away, privacy_task, private_tokens


@dataclass(kw_only=True)
class Swing(PrivacySystem):
    """Swing distillation (Li et al., 2022, arXiv 2212.08349).

    Every target token has a score s of being private. Its temperature swings from T_0 up to T_max with s, its label
    counts less, and its soft target gets noise. What the student gives away is measured by the exposure of canaries.
    The paper has no code: score, temperature map and noise are choices, all of them fields. No formal guarantee.
    """

    meta = Meta(
        card=123,
        title="Swing distillation",
        domain="language",
        family="logit KD, private tokens flattened and noised",
        citation="Li et al. (2022), Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework, "
        "arXiv 2212.08349",
        feedback=("logits", "labels"),
        elicitation="feature",
        algorithm="divergence",
        stages=4,
        role="smaller models",
    )
    demo: ClassVar = {
        **LanguageSystem.demo,
        "window": 13,
        "batch_size": 50,
        "epochs": 8.0,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "keep": "last",
        "noise_support": None,
    }
    smoke: ClassVar = {"scorer": "frequency", "private_baseline": True}

    alpha: Annotated[float, "weight of the teacher; labels get the rest, of private tokens less", Ge(0), Le(1)] = 0.9
    temperature: Annotated[float, "T_0, of tokens that are not private", Gt(0)] = 2.0
    most: Annotated[float, "T_max, of tokens that certainly are", Gt(0)] = 20.0
    shape: Annotated[Shape, "of the way from T_0 to T_max"] = "geometric"
    student_at: Annotated[Literal["same", "one"], "temperature of the student on private tokens"] = "same"
    hide_labels: Annotated[bool, "private tokens are not learnt from their labels either"] = True

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        found = yield from privacy_task(self, run)
        task = found.task
        task.teacher = yield from tuned(task, self.teacher_epochs)
        source = yield from private_tokens(found, self.detector())
        models = {"student": (yield task.train("student", partial(self._objective, task), source=source))}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        if self.private_baseline:
            models["private"] = yield self.private_student(task)
        evaluation = yield task.evaluation(models)
        if found.canaries:
            yield given_away(found, models, evaluation, most=self.candidates)

    def _objective(self, task: LanguageTask, student: Observed) -> Objective:
        return SwingTokens(
            head_of(student),
            head_of(task.observed_teacher()),
            base=self.temperature,
            most=self.most,
            shape=self.shape,
            student_at=self.student_at,
            alpha=self.alpha,
            hide_labels=self.hide_labels,
            vocab_size=task.vocab_size,
            **self.noise_options(),
        )

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "swing": {},
            "kd": {"scorer": "none", "noise": "none"},
            "temperature alone": {"noise": "none"},
            "noise alone": {"scorer": "none"},
            "noise on private tokens": {"noise_on": "private"},
            "a fifth missed": {"recall": 0.8},
            (small := "noise alone, epsilon 1"): {"scorer": "none", "epsilon": 1.0},  # the others: 2 / 0.05 = 40
        }
        arms = {name: {"baseline": False, **values} for name, values in arms.items()}
        experiment = Experiment("swing", arms, "equal teacher, text, steps and initial weights", stage="exposure")
        exposure = ("mean exposure of five canaries of 1,000 candidates, bits", "student/exposure")
        perplexity = ("perplexity on held-out sentences without canaries", "student/perplexity")
        claim = partial(experiment.claim, higher_is_better=False)
        further = partial(claim, scope="consequence")
        on_all = "noise on private tokens alone leaves ordinary text better predicted than noise on all"
        kept = "without noise, as the privacy budget grows, it still gives less away than KD's"
        missed = "finding all private tokens gives less away than missing a fifth"
        return [
            claim("swing's student gives less away than KD's", *exposure, "swing", "kd"),
            claim("and predicts ordinary text better", *perplexity, "swing", "kd"),
            claim(kept, *exposure, "temperature alone", "kd"),
            further("noise alone gives less away than KD", *exposure, "noise alone", "kd"),
            further(on_all, *perplexity, "noise on private tokens", "swing"),
            further(missed, *exposure, "swing", "a fifth missed"),
            further("noise alone gives more away at epsilon 40 than at 1", *exposure, small, "noise alone"),
            further("at epsilon 40 swing gives less away than noise alone", *exposure, "swing", "noise alone"),
        ]
