"""FIRST: the teacher's five likeliest tokens, re-scaled until their confidence can be trusted."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.core.train import Train
from stillhouse.losses.concentrated import ConcentratedKL, Form, Rescale, Side
from stillhouse.objectives.cached import CachedTokenMatch
from stillhouse.objectives.language import head_of
from stillhouse.tasks.choices import DIALECT, Choices, choice_task, dialect
from stillhouse.tasks.concentrated import kept_teacher, own_sets, trust_evaluation, trustworthy, tuned
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class FIRST(LanguageSystem):
    """Efficient trustworthy distillation (Shum et al., EMNLP 2024, arXiv 2408.12168).

    A fine-tuned teacher's knowledge sits in its few likeliest tokens. These are kept on disk (or asked of an endpoint)
    with their probabilities, re-scaled by the c that makes their confidence err least on held-out text, and the student
    minimises KL(re-scaled teacher || student) on them, without labels.
    """

    meta = Meta(
        card=117,
        title="FIRST",
        domain="language",
        family="logit KD, stored and re-calibrated top-k",
        citation="Shum et al. (2024), FIRST: Teach A Reliable Large Language Model Through Efficient Trustworthy "
        "Distillation, EMNLP 2024, arXiv 2408.12168",
        feedback="logits",
        teacher_access=("white-box", "black-box"),
        elicitation="feature",
        algorithm="divergence",
        stages=4,
        role="smaller models",
        skill="understanding",
    )
    demo: ClassVar = {
        **LanguageSystem.demo,
        **{"window": 8, "batch_size": 20, "accumulate": 1},
        "teacher_epochs": 6.0,
        "epochs": 20.0,
        "lr": 2e-3,
        "weight_decay": 0.0,
        "keep": "last",
    }
    smoke: ClassVar = {"teacher_epochs": 1.0, "accumulate": 1}

    topk: Annotated[int, "tokens kept at each position", Ge(1)] = 5
    rescale: Annotated[Form, "of the kept probabilities; probabilities: as released"] = "power"
    c: Annotated[float | None, "the re-scaling's; by default fitted on the selection text, by ECE", Gt(0)] = None
    smoothing: Annotated[float, "taken off the likeliest token with rescale=smoothing", Ge(0), Lt(1)] = 0.1
    side: Annotated[
        Side, "kept: the student sums to 1 over the kept tokens; bucket: all others are one more; whole: not at all"
    ] = "kept"
    student_c: Annotated[float | None, "softens the student's kept probabilities too, as released", Gt(0)] = None
    bins: Annotated[int, "of the calibration error", Ge(1)] = 10
    teacher_epochs: Annotated[float, "passes of the teacher over the text first; 0: it is fine-tuned", Ge(0)] = 0.0
    elsewhere: Annotated[
        str | None, "further text to be judged on, NAME=SOURCE,NAME=SOURCE; on the embedded task by default a dialect"
    ] = None
    learns: Annotated[Literal["teacher", "text"], "text: fine-tuning on the labels, to compare"] = "teacher"
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 2e-5
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.03
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 2

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from choice_task(self, run) if self.is_demo() else LanguageTask.prepare(self, run)
        task.teacher = yield from tuned(task, self.teacher_epochs)
        stage = task.train("student", task.cross_entropy) if self.learns == "text" else (yield from self._taught(task))
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        embedded = self.elsewhere is None and self.is_demo()
        sets = {DIALECT: dialect(Choices())} if embedded else own_sets(task, self.elsewhere)
        yield trust_evaluation(task, models, self.bins, sets)

    def _taught(self, task: LanguageTask) -> Generator[Stage, Artifact, Train]:
        if self.student_c is not None and self.side == "whole":
            raise ConfigError("student_c does not go with side=whole, where the kept tokens need not sum to 1")
        rescale = Rescale(form=self.rescale, c=self.c or 1.0, delta=self.smoothing)
        divergence = ConcentratedKL(kept=self.topk, rescale=rescale, side=self.side, student_c=self.student_c)
        kept = yield from kept_teacher(task, k=self.topk)
        found = yield trustworthy(task, kept, rescale, fit=self.c is None, side=self.side, bins=self.bins)
        divergence = replace(divergence, rescale=replace(rescale, c=found.json()["c"]))
        options: dict[str, Any] = {"whole": kept.whole, "vocab_size": task.vocab_size, "name": "FIRST"}
        return task.train(
            "student",
            lambda student: CachedTokenMatch(head_of(student), kept.observed, divergence, **options),
            source=kept.source,
        )

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "first": {},
            "as the teacher says": {"rescale": "none"},
            "smoothing": {"rescale": "smoothing"},
            "all tokens": {"rescale": "none", "topk": 1000},
            "others as one": {"side": "bucket"},
            "fine-tuning": {"learns": "text"},
        }
        arms = {name: {"baseline": False, **values} for name, values in arms.items()}
        experiment = Experiment("first", arms, "equal teacher, questions, steps, learning rate and initial weights")
        ece = ("expected calibration error of the answers, 10 bins", "student/trust_ece")
        right = ("share of right answers", "student/token_accuracy")
        weaker: Literal["consequence"] = "consequence"
        statements: list[tuple[str, tuple[str, str], str, str, Literal["central", "consequence"]]] = [
            ("its student is better calibrated than one fine-tuned on labels", ece, "first", "fine-tuning", "central"),
            ("and right more often", right, "first", "fine-tuning", "central"),
            ("re-scaling makes it better calibrated", ece, "first", "as the teacher says", "central"),
            ("and makes it better than label smoothing does", ece, "first", "smoothing", "central"),
            ("the five likeliest tokens teach more than all", right, "as the teacher says", "all tokens", weaker),
            ("it is better calibrated where all others count as one", ece, "others as one", "first", weaker),
        ]
        return [
            experiment.claim(said, *metric, method, baseline, higher_is_better=metric is right, scope=scope)
            for said, metric, method, baseline, scope in statements
        ]
