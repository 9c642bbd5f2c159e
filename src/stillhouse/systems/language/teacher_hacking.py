"""Teacher hacking: does a student that comes closer to its teacher move away from the truth?"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from stillhouse.base.method_facts import MethodFacts
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import DEMO, LanguageSystem, LanguageTask
from stillhouse.tasks.oracle_language import oracle_task
from stillhouse.tasks.teacher_hacking import DISTANCES, HackingSystem, Protocol, fresh_text, hacking_audit


@dataclass(kw_only=True)
class TeacherHacking(HackingSystem):
    """Teacher hacking (Tiapkin et al., ICML 2025, arXiv 2502.02671).

    An oracle stands for the truth: a teacher learns from what it writes, then a student learns from the teacher, token
    by token, on the teacher's fixed text, on text it writes anew (``fresh``), on the student's own (``on_policy``), or
    on a mixture. While it does, its distances to teacher (proxy) and oracle (golden) are measured.
    """

    meta = Meta(
        card=19,
        title="Teacher hacking",
        domain="language",
        family="audit, off-policy against on-policy",
        citation="Tiapkin et al. (2025), On Teacher Hacking in Language Model Distillation, ICML 2025, "
        "arXiv 2502.02671",
        feedback="logits",
        policy=("off-policy", "on-policy", "mixed"),
        elicitation="feature",
        algorithm="divergence",
        stages=7,
        role="smaller models",
        facts=MethodFacts(),
    )
    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "baseline": False,
        "keep": "last",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "window": 8,
        "prompt_tokens": 4,
        "new_tokens": 6,
        "own_prompts": 512,
        "oracle_texts": 3000,
        "teacher_epochs": 8.0,
        "begin_steps": 40,
        "prompts": 200,
        "batch_size": 50,
        "steps": 400,
        "evaluations": 20,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "teacher": DEMO,
        "data": DEMO,
        "oracle_texts": 40,
        "prompts": 12,
        "teacher_epochs": 2.0,
        "begin_steps": 3,
        "own_prompts": 8,
        "on_policy": 0.3,
        "fresh": True,
    }

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        self.refuse_unread()
        task = yield from oracle_task(self, run) if self.is_demo() else LanguageTask.prepare(self, run)
        protocol = Protocol.of(self, task, self.oracle)
        yield from protocol.begin(self.oracle_texts, self.teacher_epochs, self.begin_steps)
        policies = yield from protocol.student_text(self.oracle_texts, self.prompts, self.responses)
        source = partial(fresh_text, policies, fresh=self.fresh, on_policy=self.on_policy)
        stage = task.train("student", partial(self.objective, policies), source=source)
        student = yield protocol.watch(stage, self.evaluations)
        yield task.evaluation({"student": student}, more=protocol.measured, columns=DISTANCES)
        yield hacking_audit("hacking", {"student": student}, window=self.early, tolerance=self.tolerance)

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "offline": {},
            "online teacher": {"fresh": True},
            "online student": {"on_policy": 1.0},
            "4 responses": {"responses": 4},
            "4 times the prompts": {"prompts": 800},
        }
        experiment = Experiment("teacher-hacking", arms, "equal teachers, beginnings, steps and batches; 200 prompts")
        away = "KL(oracle || student) of whole responses at the end, nats"
        pairs = [
            ("online teacher", "offline", "a student ends nearer to the oracle if its teacher writes anew each time"),
            ("online student", "offline", "and if it writes itself"),
            ("4 responses", "offline", "several responses of the teacher to a prompt bring it nearer too"),
            ("4 times the prompts", "4 responses", "of equally many responses, those to more prompts are better"),
        ]
        return [
            experiment.claim(
                statement,
                away,
                "student/golden",
                method,
                baseline,
                higher_is_better=False,
                scope="central" if method == "online teacher" else "consequence",
            )
            for method, baseline, statement in pairs
        ]
