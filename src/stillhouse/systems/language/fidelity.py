"""Generalisation and fidelity: distilled students may be right without saying what their teacher says."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.data.responses import Coder
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.fidelity import GridSystem, Study, single_accuracy
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.memorisation import taught
from stillhouse.tasks.policies import Policies
from stillhouse.tasks.sums import MARKER, Sums, sum_teacher, sums_task

SMALL, MIDDLE, LARGE = (f"layers=1;hidden_size={width};heads=2" for width in (24, 48, 96))


@dataclass(kw_only=True)
class FidelityStudy(GridSystem):
    """On the generalization vs fidelity paradox (Ramesh, Sengupta, Chakraborty, Findings of ACL 2025, 2505.15442).

    Students of several sizes learn in several ways; some of a teacher with noise in its logits, of another temperature,
    or that does not know the task. Measured are accuracy, agreement with the teacher's answers, and the BLEU of their
    reasoning to the teacher's.
    """

    meta = Meta(
        card=172,
        title="Generalisation and fidelity",
        domain="language",
        family="audit, grid of objectives",
        citation="Ramesh, Sengupta, Chakraborty (2025), On the Generalization vs Fidelity Paradox in Knowledge "
        "Distillation, Findings of ACL 2025, arXiv 2505.15442",
        feedback=("logits", "traces"),
        policy=("off-policy", "mixed"),
        granularity="token",
        algorithm=("divergence", "supervised fine-tuning"),
        stages="one a student, three more",
        role="smaller models",
    )
    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "student": "layers=1",
        "students": (SMALL, MIDDLE, LARGE),
        "marker": MARKER,
        "window": 12,
        "noises": (5.0,),
        "temperatures": (5.0,),
        "batch_size": 50,
        "steps": 600,
        "epochs": 50.0,
        "lr": 5e-3,
        "weight_decay": 0.0,
        "keep": "last",
        "lora": None,
        "teacher_epochs": 0.0,
        "new_tokens": 16,
        "own_prompts": 300,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "students": ("layers=1",),
        "objectives": ("sft", "gkd", "seq-kd"),
        "noises": (1.0,),
        "temperatures": (),
        "teacher_epochs": 0.1,
        "lora": None,
        "prompt_tokens": 6,
        "new_tokens": 6,
        "own_prompts": 4,
        "teacher_texts": 8,
    }

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from sums_task(self, run) if self.is_demo() else LanguageTask.prepare(self, run)
        self.refuse_unread()
        before, builders = task.teacher, self.builders(task)
        if self.teacher_epochs:
            task.teacher = yield from taught(task, self.teacher_epochs)
        elif self.unaware and self.is_demo():
            before = yield from sum_teacher("base", Sums(), task.tokenizer, modulus=7)
        elif self.unaware:
            raise ConfigError("unaware=true learns from the teacher before it was taught; set teacher_epochs above 0")
        policies = Policies(self, task, Coder(task.tokenizer), task.batches())
        sizes, rest = self.students or (self.student,), (self.marker, self.on_policy, self.groups)
        study = Study(task, policies, sizes, builders, before, *rest)
        yield from study.run(self.cells(len(sizes)))
        student = yield study.product()
        yield task.evaluation({"student": student})
        yield study.audit(self.sentence_encoder)

    def claims(self) -> list[Claim]:
        def arm(students: tuple[str, ...], *ways: str, **values: Any) -> dict[str, Any]:
            return {"students": students, "objectives": ways, "noises": (), "temperatures": (), **values}

        arms = {
            "distilled": arm((SMALL,), "forward-kl"),
            "text alone": arm((SMALL,), "sft"),
            "small": arm((SMALL,), "sft", "forward-kl"),
            "large": arm((LARGE,), "sft", "forward-kl"),
            "clear teacher": arm((MIDDLE,), "forward-kl"),
            "noise 5": arm((MIDDLE,), noises=(5.0,)),
            "temperature 5": arm((MIDDLE,), temperatures=(5.0,)),
            "unaware teacher": arm((MIDDLE,), unaware=True),
        }
        experiment = Experiment("fidelity", arms, "equal steps and batches on 600 sums; one teacher", stage="fidelity")
        claim = partial(experiment.claim, metric="share of right answers to held-out sums", figure=single_accuracy)
        gain = "accuracy of the student distilled with the forward KL above that of its like trained on the text"
        return [
            claim("a small student answers better after distillation", method="distilled", baseline="text alone"),
            experiment.claim(
                "a small student gains more from distillation than a larger one",
                *(gain, "forward-kl-1/gain", "small", "large"),
            ),
            *(
                claim(f"a student learns less: {worse}", method="clear teacher", baseline=worse, scope="consequence")
                for worse in ("noise 5", "temperature 5", "unaware teacher")
            ),
        ]
