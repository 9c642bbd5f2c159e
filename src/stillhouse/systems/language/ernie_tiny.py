"""ERNIE-Tiny: from a general teacher to a task model in four phases, each changing one thing."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.phases import PhasedTask, parse_phases
from stillhouse.tasks.text_classification import DEMO, TextClassificationSystem, demo_shifted


@dataclass(kw_only=True)
class ErnieTiny(TextClassificationSystem):
    """Progressive distillation of pretrained encoders (Su et al., 2021, arXiv 2106.02241).

    General distillation, general-enhanced distillation (a fine-tuned teacher on general text), task-adaptive and
    task-specific distillation: between two phases either the teacher changes, or the text, or the losses.
    """

    meta = Meta(
        card=12,
        title="ERNIE-Tiny",
        domain="language",
        family="progressive multi-stage KD, hidden states, attention and logits",
        citation="Su et al. (2021), ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer "
        "Compression, arXiv 2106.02241",
        feedback=("features", "relations", "logits", "labels"),
        granularity=("token", "sequence"),
        elicitation=("feature", "labelling"),
        algorithm=("similarity", "divergence"),
        knowledge=("feature", "relation", "response"),
        stages="teacher, augmentation, GD, GED, TAD, TSD",
        role="smaller models",
        skill="understanding",
    )
    demo: ClassVar = {
        **TextClassificationSystem.demo,
        "student": "layers=2,hidden_size=32,intermediate_size=128",
        "phases": (
            "gd: pretrained general latent steps=160 lr=3e-3",
            "ged: fine-tuned general latent steps=120 lr=3e-3",
            "tad: fine-tuned task latent steps=80 lr=3e-3",
            "tsd: fine-tuned task latent+soft+hard steps=120 lr=3e-3",
        ),
        "augment": 8,
        "candidates": 5,
    }
    smoke: ClassVar = {
        **TextClassificationSystem.smoke,
        "phases": (
            "gd: pretrained general latent steps=3",
            "ged: fine-tuned general latent steps=3",
            "tad: fine-tuned task latent steps=3",
            "tsd: fine-tuned task latent+soft+hard steps=12",
        ),
        "augment": 2,
    }

    student: Annotated[
        str, "sizes that differ from the teacher's, or the directory or hub id of a student that exists"
    ] = "layers=4,hidden_size=312,intermediate_size=1200"
    corpus: Annotated[str, "general text: .txt, .jsonl or .parquet file, folder, hub data set id, or 'demo'"] = DEMO
    tuned: Annotated[str | None, "a fine-tuned teacher; by default the teacher is fine-tuned first"] = None
    phases: Annotated[
        tuple[str, ...],
        "NAME: pretrained|fine-tuned general|task LOSSES, the losses latent, soft, hard joined by +; then epochs=, "
        "steps=, lr= as wished",
    ] = (
        "gd: pretrained general latent epochs=3 lr=1e-4",
        "ged: fine-tuned general latent epochs=3 lr=1e-4",
        "tad: fine-tuned task latent epochs=10 lr=5e-5",
        "tsd: fine-tuned task latent+soft+hard epochs=3 lr=2e-5",
    )
    skip: Annotated[tuple[str, ...], "phases left out, by name"] = ()
    temperature: Annotated[float, "of the soft labels", Gt(0)] = 1.0
    augment: Annotated[int, "copies of each training example with words replaced; 0: none", Ge(0)] = 20
    candidates: Annotated[int, "words that may take the place of one", Ge(1)] = 15
    replace_rate: Annotated[float, "probability that a word is replaced", Ge(0), Le(1)] = 0.4

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        phases = parse_phases(self.phases, self.skip)
        task = yield from PhasedTask.prepare_phases(
            self, run, corpus=self.corpus, augment=self.augment, candidates=self.candidates, rate=self.replace_rate
        )
        models: dict[str, Artifact] = {}
        task.tuned = self.tuned
        if self.tuned is None:
            models["teacher"] = yield task.finetune("teacher", task.new_classifier())
            task.tuned = models["teacher"].path
        models["student"] = yield from task.through(phases, self.student, temperature=self.temperature)
        reference = "teacher" if "teacher" in models else None
        more = {"shifted": demo_shifted()} if self.data == DEMO else {}
        yield task.evaluation(models, reference=reference, more=more)

    def claims(self) -> list[Claim]:
        gd, ged = "gd: pretrained general latent lr=3e-3 steps=", "ged: fine-tuned general latent lr=3e-3 steps="
        tad, tsd = "tad: fine-tuned task latent lr=3e-3 steps=", "tsd: fine-tuned task latent+soft+hard lr=3e-3 steps="
        plans = {
            "TSD": (f"{tsd}480",),
            "GD, TSD": (f"{gd}280", f"{tsd}200"),
            "GD, GED, TSD": (f"{gd}160", f"{ged}120", f"{tsd}200"),
            "all four": (f"{gd}160", f"{ged}120", f"{tad}80", f"{tsd}120"),
            "GED, TSD": (f"{ged}280", f"{tsd}200"),
        }
        arms = {name: {"phases": plan} for name, plan in plans.items()}
        budget = "480 steps of equal batches and learning rates; 64 labelled sentences; the same teachers"
        claim = partial(Experiment("ernie-tiny", arms, budget).claim, higher_is_better=False)
        divergence, kl = "KL to the fine-tuned teacher on 1,000 held-out sentences, nats", "student/kl"
        return [
            claim("four phases beat task distillation alone", divergence, kl, "all four", "TSD"),
            claim("a fine-tuned teacher on general text in between helps", divergence, kl, "GD, GED, TSD", "GD, TSD"),
            claim("general distillation first helps", divergence, kl, "GD, TSD", "TSD", scope="consequence"),
            Experiment("ernie-tiny", arms, budget).claim(
                "a fine-tuned teacher on general text helps on text of another sort",
                "accuracy on 1,000 sentences with few adjectives",
                "student/shifted",
                "GD, GED, TSD",
                "GD, TSD",
                scope="consequence",
            ),
        ]
