"""The six ways to ask a teacher, and what is learnt from each: the survey's pillars as one runnable tour."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.elicitation import ExpectedReward, TeacherLabels
from stillhouse.objectives.features import FeatureMSE
from stillhouse.objectives.logits import KLDivergence
from stillhouse.objectives.self_targets import image_feature
from stillhouse.tasks.elicitation import Inputs, SeededSystem, Seeds
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.vision import VisionTask

INPUTS: dict[str, Inputs] = {"expansion": "expanded", "curation": "curated"}
SFT, RL, RANKED = "supervised fine-tuning", "reinforcement learning", {"dpo": 2, "rrhf": 4, "pro": 4, "reward": 2}


@dataclass(kw_only=True)
class Elicitation(SeededSystem):
    """Elicitation and distillation algorithms of a survey on KD of LLMs (Xu et al., 2024, arXiv 2402.13116), on images.

    A student learns ``labelled`` seeds, then goes on with them and what ``ask`` elicits: the teacher's answers on given
    inputs (labelling), on new ones made from them (expansion) or of what is known of classes (curation), its inner
    knowledge (feature), its ranking of guesses (feedback), own confident answers (self-knowledge), nothing (none).
    """

    meta = Meta(
        card=165,
        title="Six ways to ask a teacher",
        domain="vision",
        family="survey: elicitation x algorithm",
        citation="Xu et al. (2024), A Survey on Knowledge Distillation of Large Language Models, arXiv 2402.13116",
        feedback=("labels", "logits", "features", "preferences"),
        teacher_access=("white-box", "black-box", "teacher-free"),
        granularity="sample",
        policy=("off-policy", "on-policy"),
        elicitation=("labelling", "expansion", "curation", "feature", "feedback", "self-knowledge"),
        algorithm=(SFT, "divergence", "similarity", "ranking", RL),
        knowledge=("response", "feature"),
        scheme=("offline", "self"),
        modality="image",
        stages="2-3",
        role=("smaller models", "self-improvement"),
    )
    recipes: ClassVar = {
        **{(ask, SFT): {"ask": ask} for ask in ("labelling", "expansion", "curation", "self-knowledge")},
        ("feature", "divergence"): {"ask": "feature", "hidden": 0.0},
        ("feature", "similarity"): {"ask": "feature"},
        ("feedback", "ranking"): {"ask": "feedback", "learn": "dpo"},
        ("feedback", RL): {"ask": "feedback", "learn": "reward"},
    }
    smoke: ClassVar = {**SeededSystem.smoke, "ask": "feedback", "learn": "reward"}

    ask: Annotated[
        Literal["none", "labelling", "expansion", "curation", "feature", "feedback", "self-knowledge"],
        "what the teacher is asked for; self-knowledge: the student itself",
    ] = "labelling"
    weight: Annotated[float, "of what is elicited, beside the seeds' labels", Ge(0)] = 1.0
    temperature: Annotated[float, "feature: softens both distributions", Gt(0)] = 2.0
    hidden: Annotated[float, "feature: weight of the hidden features' squared error", Ge(0)] = 1.0
    learn: Annotated[
        Literal["pairwise", "dpo", "rrhf", "pro", "reward"],
        "feedback: the ranking loss; reward: a reward model learns the ranking, and the student maximises it",
    ] = "pairwise"
    guesses: Annotated[int, "feedback: the student's guesses that the teacher ranks", Ge(2)] = 2
    beta: Annotated[float, "feedback: of DPO, and of the KL to the first student beside the reward", Gt(0)] = 0.1
    confidence: Annotated[float, "self-knowledge: least probability of an own answer to learn from", Ge(0), Lt(1)] = 0.9

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=self.ask not in ("none", "self-knowledge"))
        seeds = Seeds.of(self, task, pool="seeds" if self.ask == "none" else self.pool)
        first = yield seeds.first("seeds")
        inputs, start, reward = seeds.inputs(INPUTS.get(self.ask, "given")), seeds.frozen(first, "first"), None
        feedback = partial(seeds.feedback, first=start, learn=self.learn, guesses=self.guesses, beta=self.beta)
        if self.ask == "feedback" and self.learn == "reward":
            reward = seeds.frozen((yield seeds.train("reward", first, seeds.inputs("given"), feedback)), "reward")

        def elicited(student: Observed) -> Objective:
            logits = student.output("logits")
            if reward is not None:
                judge, before = reward.output("logits"), start.output("logits")
                return self.weight * ExpectedReward(logits, judge, before, beta=self.beta)
            if self.ask == "feedback":
                return self.weight * feedback(student)
            if self.ask == "self-knowledge":
                return self.weight * TeacherLabels(logits, start.output("logits"), confidence=self.confidence)
            teacher = task.observed_teacher()
            if self.ask != "feature":
                return self.weight * TeacherLabels(logits, teacher.output("logits"))
            match: Objective = KLDivergence(logits, teacher.output("logits"), temperature=self.temperature)
            if self.hidden:
                match += self.hidden * FeatureMSE(image_feature(student), image_feature(teacher), project="linear")
            return self.weight * match

        student = yield seeds.train("student", first, inputs, None if self.ask == "none" else elicited)
        yield task.evaluation({"student": student, "seeds": first})

    def claims(self) -> list[Claim]:
        arms: dict[str, dict[str, Any]] = {
            "seeds": {"ask": "none"},
            **{ask: {"ask": ask} for ask in self.meta.elicitation},
            "labelling the seeds": {"ask": "labelling", "pool": "seeds"},
            "expanding the seeds": {"ask": "expansion", "pool": "seeds"},
            **{how: {"ask": "feedback", "learn": how, "guesses": count} for how, count in RANKED.items()},
        }
        claim = Experiment("elicitation", arms, "100 labels, equal steps, batches and initial weights").claim
        accuracy, also = ("accuracy on test digits", "student/accuracy"), partial(claim, scope="consequence")
        created = "a teacher that creates the inputs to answer teaches more than one that only answers given ones"
        return [
            claim(f"{created} (100 seeds)", *accuracy, "expanding the seeds", "labelling the seeds"),
            also("a teacher's labels for unlabelled inputs help", *accuracy, "labelling", "seeds"),
            also("so does what it makes of the classes", *accuracy, "curation", "seeds"),
            also("its ranking of guesses helps as well", *accuracy, "feedback", "seeds"),
            also("but less than its labels", *accuracy, "labelling", "feedback"),
            also("its inner knowledge teaches more than its labels", *accuracy, "feature", "labelling"),
            also("own confident answers help", *accuracy, "self-knowledge", "seeds"),
            *(also(f"its ranking of {n} guesses helps ({how})", *accuracy, how, "seeds") for how, n in RANKED.items()),
        ]
