"""PS-KD for language models: a model is its own teacher, an epoch ago, at every token."""

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
from stillhouse.objectives.language import head_of
from stillhouse.objectives.memory import ByEpoch
from stillhouse.objectives.token_memory import RememberedTokens, SnapshotTokens, TokenMemory
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.teachers.cache import Numbered


@dataclass(kw_only=True)
class PSKDLM(LanguageSystem):
    """Self-knowledge distillation with progressive refinement of targets (Kim et al., ICCV 2021, arXiv 2006.12000).

    What ``ps-kd`` does for images, done for every predicted token, as the paper does for translation: in epoch t of T
    the target is (1 - a_t) next token + a_t (what the model said there in epoch t - 1), a_t = ``alpha`` t / T. Records
    of prompt and completion (a sentence and its translation) are trained on the completions alone. There is no other
    teacher; ``teacher`` names the tokenizer, and the architecture that ``student`` scales.
    """

    meta = Meta(
        card=76,
        title="PS-KD for language models",
        domain="language",
        family="self-distillation, target softening",
        citation="Kim et al. (2021), Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021, "
        "arXiv 2006.12000",
        feedback=("logits", "labels"),
        teacher_access="teacher-free",
        elicitation="self-knowledge",
        algorithm="divergence",
        scheme="self",
        role="self-improvement",
    )
    smoke: ClassVar = {"topk": 4, "batch_size": 16}  # 22 steps are several epochs

    alpha: Annotated[float, "weight of the model's own opinion in the last epoch", Ge(0), Le(1)] = 0.8
    past: Annotated[
        Literal["table", "snapshot"],
        "the past opinion: kept in a table by token, or asked anew of the weights of the last epoch's end",
    ] = "table"
    topk: Annotated[int, "likeliest tokens that the table keeps; the others are one outcome", Ge(1)] = 16
    epochs: Annotated[float, "passes over the text", Gt(0)] = 10.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        alpha = ByEpoch(self.alpha, task.passes_of(self.steps or task.steps_of(self.epochs)))

        def objective(student: Observed) -> Objective:
            if self.past == "snapshot":
                return SnapshotTokens(student, alpha=alpha, vocab_size=task.vocab_size)
            memory = TokenMemory(len(task.windows.train), self.window - 1, k=self.topk, vocab_size=task.vocab_size)
            return RememberedTokens(head_of(student), memory, alpha=alpha)

        stage = task.train("student", objective)
        stage.source.data = Numbered(stage.source.data)
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "ps-kd": {"baseline": False},
            "text alone": {"alpha": 0.0, "baseline": False},
        }
        experiment = Experiment("ps-kd-lm", arms, "equal steps, batches and initial weights")
        metrics = {
            "student/val_loss": "validation loss, nats per token",
            "student/ece": "expected calibration error of the likeliest next token, 15 bins",
        }
        better = "targets mixed with its own past opinion make a language model better than the text alone does"
        return [
            experiment.claim(better, metric, figure, "ps-kd", "text alone", higher_is_better=False, scope="consequence")
            for figure, metric in metrics.items()
        ]
