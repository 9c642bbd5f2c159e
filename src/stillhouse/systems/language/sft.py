"""Supervised fine-tuning: no teacher; the baseline of every language system."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Meta
from stillhouse.tasks.language import LanguageSystem, LanguageTask


@dataclass(kw_only=True)
class SFT(LanguageSystem):
    """The student on the text alone, by next-token cross-entropy.

    The teacher gives the student its shape and tokenizer, and a row in the table; it teaches nothing.
    """

    meta = Meta(
        title="Supervised fine-tuning",
        domain="language",
        family="baseline",
        feedback="none",
        teacher_access="teacher-free",
        algorithm="supervised fine-tuning",
        knowledge="data",
        scheme="none",
        facts=MethodFacts(shared_tokenizer=False, beside=(), drawing="nothing drawn", own_text=0.0, sampler="data"),
    )
    demo: ClassVar = {**LanguageSystem.demo, "baseline": False}

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        student = yield task.train("student", task.cross_entropy)
        yield task.evaluation({"student": student})
