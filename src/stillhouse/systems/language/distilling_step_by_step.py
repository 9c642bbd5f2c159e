"""Distilling step-by-step: rationales of a large model as a second task for a small one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.models.text_to_text import TextToText
from stillhouse.objectives.sequence import rationale_multitask, sequence_cross_entropy
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.reasoning_text import DEMO, Questions, QuestionSystem, Tasks, demo_rule, new_student

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

    student: Annotated[str, "directory or hub id of an encoder-decoder or a causal LM; 'demo': a tiny T5"] = (
        "google/t5-v1_1-base"
    )
    mode: Annotated[Mode, "the paper's method, or one of its baselines"] = "multi-task"
    form: Annotated[Literal["paper", "code"], "L_label + lambda L_rationale, or the code's alpha and 1 - alpha"] = (
        "paper"
    )
    rationale_weight: Annotated[float, "lambda of the paper's form", Ge(0)] = 1.0
    alpha: Annotated[float, "weight of the label in the code's form", Ge(0), Le(1)] = 0.5
    steps: Annotated[int, "optimizer steps", Ge(1)] = 10_000
    batch_size: Annotated[int, "examples in a step", Ge(1)] = 64
    lr: Annotated[float, "learning rate of AdamW", Gt(0)] = 5e-5
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.0
    max_source: Annotated[int, "tokens of an input that are read", Ge(1)] = 1024
    max_rationale: Annotated[int, "tokens of a rationale", Ge(1)] = 256
    max_label: Annotated[int, "tokens of a label", Ge(1)] = 64
    keep: Annotated[Literal["best", "last"], "weights kept: the best on what is held out, or the last"] = "best"

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        questions = self.questions()
        keys, stage = self.answers(run, "answers", self.prompts(questions), rule=demo_rule)
        answers = yield stage
        if self.__dict__["dry_run"]:
            return
        traces = yield self.rationales(questions, keys, answers)
        student = new_student(self.student, seed=self.seed, trust_remote_code=self.trust_remote_code)
        trained = yield self.train(self.tasks(student), questions, traces)
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

    def train(self, tasks: Tasks, questions: Questions, traces: Artifact) -> Train:
        """Stage 2: both tasks in every step, one backward."""
        player = tasks.player(self.objective, lr=self.lr, weight_decay=self.weight_decay)
        return Train(
            "student",
            player,
            source=tasks.batches(traces, self.batch_size, seed=self.seed),
            steps=self.steps,
            evaluate=lambda: {"accuracy": tasks.accuracy(questions.validation)},
            best="-accuracy" if self.keep == "best" else None,
            save=tasks.save,
        )

    def claims(self) -> list[Claim]:
        arms = {mode: {"mode": mode} for mode in ("multi-task", "label-only")}
        budget = "equal examples, steps, batches and initial weights; the second task is a second forward"
        return [
            Experiment("distilling-step-by-step", arms, budget).claim(
                "with rationales as a second task, a small model trained on few examples finds more labels "
                "than the same model trained on the labels alone",
                "accuracy on 2,000 held-out questions",
                "student/accuracy",
                "multi-task",
                "label-only",
            )
        ]
