"""Distilling step-by-step: rationales of a large model as a second task for a small one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.models.text_to_text import TextToText
from stillhouse.objectives.sequence import rationale_multitask, sequence_cross_entropy
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.reasoning_text import DEMO, QuestionSystem, Tasks, curve_mean, demo_rule

Mode = Literal["multi-task", "label-only", "single-task"]


@dataclass(kw_only=True)
class DistillingStepByStep(QuestionSystem):
    """Distilling step-by-step (Hsieh et al., 2023, arXiv 2305.02301).

    A teacher writes a rationale and a label for every input (few-shot chain of thought). The student learns two tasks,
    told apart by a prefix: ``predict: x`` gives the label, ``explain: x`` the rationale; L_label + lambda L_rationale.
    In use it only predicts, so rationales cost nothing then. ``mode`` has the paper's baselines: the label alone, and
    rationale and label in one target.
    """

    meta = Meta(
        card=71,
        title="Distilling step-by-step",
        domain="language",
        family="rationale distillation",
        citation="Hsieh et al. (2023), Distilling Step-by-Step! Outperforming Larger Language Models with Less "
        "Training Data and Smaller Model Sizes, arXiv 2305.02301",
        feedback=("traces", "labels"),
        teacher_access="black-box",
        granularity="sequence",
        elicitation="labelling",
        algorithm="supervised fine-tuning",
        stages=2,
        role="smaller models",
        skill="thinking patterns",
    )
    demo: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "weight_decay": 0.05,
        "steps": 600,
        "student": DEMO,
        "max_source": 64,
        "max_rationale": 16,
        "max_label": 4,
    }
    smoke: ClassVar[dict[str, Any]] = {"steps": 22, "batch_size": 8}

    mode: Annotated[Mode, "the paper's method, or one of its baselines"] = "multi-task"
    form: Annotated[Literal["paper", "code"], "L_label + lambda L_rationale, or the code's alpha and 1 - alpha"] = (
        "paper"
    )
    rationale_weight: Annotated[float, "lambda of the paper's form", Ge(0)] = 1.0
    alpha: Annotated[float, "weight of the label in the code's form", Ge(0), Le(1)] = 0.5

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        questions = self.questions()
        keys, stage = self.answers(run, "answers", self.prompts(questions), rule=demo_rule)
        answers = yield stage
        if self.__dict__["dry_run"]:
            return
        traces = yield self.rationales(questions, keys, answers)
        trained = yield from self.students(questions, keys, answers, traces, self.tasks, self.objective)
        yield self.evaluation(questions, traces, trained, self.tasks)

    def tasks(self, student: TextToText) -> Tasks:
        """The tasks of this mode."""
        names = {"multi-task": ("predict", "explain"), "label-only": ("predict",), "single-task": ("cot",)}[self.mode]
        lengths = {"max_label": self.max_label, "max_rationale": self.max_rationale}
        return Tasks.of(student, names, max_source=self.max_source, **lengths)

    def objective(self, student: Observed) -> Objective:
        """What this mode minimises."""
        if self.mode != "multi-task":
            return sequence_cross_entropy(student, "predict" if self.mode == "label-only" else "cot")
        if self.form == "code":
            return rationale_multitask(student, rationale_weight=None, alpha=self.alpha)
        return rationale_multitask(student, rationale_weight=self.rationale_weight)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {mode: {"mode": mode} for mode in ("multi-task", "label-only")}
        budget = "equal examples, steps, batches and initial weights; the second task is a second forward"
        claim = Experiment("distilling-step-by-step", arms, budget).claim
        half: dict[str, dict[str, Any]] = {
            "half, multi-task": {"mode": "multi-task", "examples": 200},
            "label-only": arms["label-only"],
        }
        fewer = Experiment("distilling-step-by-step", half, "equal steps, batches and initial weights").claim
        curves = {f"curve, {mode}": {"mode": mode, "curve": (100, 200), "steps": 300} for mode in arms}
        curve = Experiment("distilling-step-by-step", curves, budget).claim
        noisy = {"noise": "noisy", "noise_cost": True, "steps": 300}
        spoilt = {f"noise, {mode}": {"mode": mode, **noisy} for mode in ("multi-task", "single-task")}
        noise = Experiment("distilling-step-by-step", spoilt, "equal examples, noise, steps and initial weights").claim
        found: str = "accuracy on 2,000 held-out questions"
        small: dict[str, Any] = {"scope": "consequence"}
        learns = (
            "with rationales as a second task, a small model trained on few examples finds more labels "
            "than the same model trained on the labels alone"
        )
        saves = "200 examples with rationales as a second task are worth more than 400 with labels alone"
        along = "rationales as a second task help along the data curve"
        costs = "noise in the rationales costs a student less that does not write them in use"
        mean, lost = f"{found}, mean of 100, 200 and 400 examples", f"{found}, lost against clean rationales"
        return [
            claim(learns, found, "student/accuracy", "multi-task", "label-only"),
            fewer(saves, found, "student/accuracy", "half, multi-task", "label-only", **small),
            curve(along, mean, curve_mean, "curve, multi-task", "curve, label-only", **small),
            noise(
                costs, lost, "noise_cost", "noise, multi-task", "noise, single-task", higher_is_better=False, **small
            ),
        ]
