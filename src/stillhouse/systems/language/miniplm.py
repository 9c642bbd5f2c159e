"""MiniPLM: a teacher and a small reference choose the text that students are pre-trained on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem
from stillhouse.tasks.refining import Refining, Select


@dataclass(kw_only=True)
class MiniPLM(LanguageSystem):
    """MiniPLM: knowledge distillation for pre-training language models (Gu et al., ICLR 2025, arXiv 2410.17215).

    Of a corpus D, the share ``alpha`` is kept on which log p_teacher(x) - log p_reference(x) is largest. Both models
    read D once; what is kept (stage ``refined``) is text, for students of any size, family and tokenizer. The student
    is pre-trained on it in the corpus's order. ``window`` is the length of a passage.
    """

    meta = Meta(
        card=119,
        title="MiniPLM",
        domain="language",
        family="data selection by difference sampling",
        citation="Gu, Zhou, Meng, Zhou and Huang (2025), MiniPLM: Knowledge Distillation for Pre-Training Language "
        "Models, ICLR 2025, arXiv 2410.17215",
        feedback="data",
        teacher_access=("white-box", "black-box"),
        granularity="sequence",
        elicitation="curation",
        algorithm="supervised fine-tuning",
        knowledge="data",
        stages="reference + 2 scores + selection + 1",
        role="smaller models",
    )
    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "student": "scale:0.1",
        "window": 64,
        "epochs": 3.0,
        "keep": "last",
        "eval_windows": 16,
        "reference": "layers=1,hidden_size=48,heads=4,intermediate_size=96",
        "reference_share": 0.1,
        "reference_epochs": 6.0,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "reference": "layers=1",
        "reference_share": 0.2,
        "reference_epochs": 2.0,
        "baseline": True,
    }

    reference: Annotated[
        str, "small model that the teacher is compared with: directory or hub id, or a shape that is trained first"
    ] = "scale:0.06"
    reference_share: Annotated[float, "share of the corpus it is trained on; no student is", Gt(0), Lt(1)] = 0.05
    reference_epochs: Annotated[float, "passes over that share", Gt(0)] = 1.0
    alpha: Annotated[float, "share of the corpus that is kept", Gt(0), Le(1)] = 0.5
    select: Annotated[
        Select,
        "difference: the largest differences; gumbel: drawn by them; teacher-loss: what the teacher finds likeliest; "
        "random: as conventional pre-training on as much text",
    ] = "difference"
    gumbel_temperature: Annotated[float, "gumbel: scores, nats a token, are divided by it", Gt(0)] = 1.0
    kd_ratio: Annotated[float, "weight of KL(teacher || student) beside the text's loss (vanilla KD)", Ge(0), Le(1)] = (
        0.0
    )
    window: Annotated[int, "tokens in a passage", Ge(8)] = 1025
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 512
    epochs: Annotated[float, "passes over what was kept", Gt(0)] = 1.0
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 6e-4
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.02
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Lt(1)] = 0.98

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        refining = yield from Refining.prepare(
            self,
            run,
            reference=self.reference,
            reference_share=self.reference_share,
            reference_epochs=self.reference_epochs,
        )
        scored, kept = yield from refining.scores(self.select, self.alpha, self.gumbel_temperature)
        yield from refining.refined(scored, kept)
        task = refining.student_task(kept)
        steps = self.steps or task.steps_of(self.epochs)
        train = partial(refining.pretraining, epochs=self.epochs, steps=steps)
        models = {"student": (yield train("student", task, kd_ratio=self.kd_ratio))}
        if self.baseline:
            models["baseline"] = yield train("baseline", refining.student_task(refining.corpus))
        yield refining.evaluation(task, models)

    def claims(self) -> list[Claim]:
        common = {"steps": 240, "baseline": False}
        arms: dict[str, dict[str, Any]] = {
            "miniplm": common,
            "random half": {**common, "select": "random"},
            "likeliest half": {**common, "select": "teacher-loss"},
            "vanilla KD": {**common, "select": "random", "kd_ratio": 0.5},
            "all, twice the steps": {**common, "select": "random", "alpha": 1.0, "steps": 480},
        }
        budget = "equal steps, batches and initial weights, but for the arm with twice the steps"
        claim = partial(
            Experiment("miniplm", arms, budget).claim,
            metric="loss on held-out documentation, nats per token",
            figure="student/val_loss",
            method="miniplm",
            higher_is_better=False,
        )
        return [
            claim("the refined half of a corpus makes a better student than a random half", baseline="random half"),
            claim("a better one than the half that the teacher finds likeliest", baseline="likeliest half"),
            claim("a better one than KD on a random half", baseline="vanilla KD"),
            claim(
                "and than the whole corpus with twice the steps", baseline="all, twice the steps", scope="consequence"
            ),
        ]
