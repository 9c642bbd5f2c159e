"""Distillation of encoders with efficient attention: convert, go on pre-training, distil, fine-tune, compare."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.models.efficient_attention import Attention
from stillhouse.objectives.distilbert import triple_loss
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.long_context import LongContextSystem, LongContextTask


@dataclass(kw_only=True)
class EfficientAttentionKD(LongContextSystem):
    """Efficient transformer knowledge distillation: a performance review (Brown et al., 2023, 2311.13657).

    A full-attention encoder is converted, goes on filling in masked tokens at its new length, and is distilled to half
    of its layers with DistilBERT's loss; teacher and student are fine-tuned alike. The table has what the student keeps
    of its teacher's scores, on tasks whose reason is near or far, and what both cost, for every attention asked for.
    """

    meta = Meta(
        card=168,
        title="Efficient-attention KD review",
        domain="language",
        family="comparison of KD for encoders with efficient attention",
        citation="Brown et al. (2023), Efficient Transformer Knowledge Distillation: A Performance Review, "
        "arXiv 2311.13657",
        feedback=("logits", "features", "data"),
        granularity=("token", "model"),
        elicitation="feature",
        algorithm=("divergence", "similarity", "supervised fine-tuning"),
        knowledge=("response", "feature"),
        stages="2 + 2 x tasks, for each attention",
        role="compression",
        skill="understanding",
    )
    demo: ClassVar = {**LongContextSystem.demo, "pretrain_steps": 60, "steps": 120}
    smoke: ClassVar = {**LongContextSystem.smoke, "attention": ["nystromformer"], "pretrain_steps": 2, "steps": 22}

    attention: Annotated[
        list[Attention] | None, "kinds to compare, Longformer alone by default; the first one's student is the result"
    ] = None
    pretrain_steps: Annotated[int, "steps of the converted model on masked tokens", Ge(1)] = 65_000
    steps: Annotated[int, "steps of distillation", Ge(1)] = 65_000
    layers: Annotated[int | None, "layers of the student, alternate ones of the teacher's; half by default", Ge(1)] = (
        None
    )
    begin: Annotated[Literal["alternate", "random"], "the student's first weights"] = "alternate"
    learn_from: Annotated[Literal["teacher", "text"], "DistilBERT's loss, or masked tokens alone"] = "teacher"
    soft_weight: Annotated[float, "weight of the teacher's distributions on masked tokens", Ge(0)] = 5.0
    masked_weight: Annotated[float, "weight of the masked tokens themselves", Ge(0)] = 2.0
    cosine_weight: Annotated[float, "weight of 1 - cos of the last hidden states", Ge(0)] = 1.0
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    tune_teacher: Annotated[bool, "fine-tune the teacher too: without it there is no retention"] = True

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        kinds: list[Attention] = list(dict.fromkeys(self.attention or ["longformer"]))
        task = yield from LongContextTask.prepare(self, run)
        models: dict[str, Artifact] = {}
        tuned: dict[str, dict[str, Artifact]] = {}
        for kind in kinds:
            converted = yield task.converted(f"{kind}-converted", kind)
            teacher = yield task.fill_in(f"{kind}-teacher", converted, self.pretrain_steps)
            student = yield task.distil(
                "student" if kind == kinds[0] else f"{kind}-student",
                teacher,
                self.objective(),
                layers=self.layers,
                steps=self.steps,
                random_weights=self.begin == "random",
            )
            for who, model in (("teacher", teacher), ("student", student)):
                models[f"{kind} {who}"], tuned[f"{kind} {who}"] = model, {}
                for name, data in task.sets.items() if who == "student" or self.tune_teacher else ():
                    tuned[f"{kind} {who}"][name] = yield task.tune(f"{name}-{kind}-{who}", model, data)
        yield task.evaluation(models, tuned, {f"{kind} student": f"{kind} teacher" for kind in kinds})

    def objective(self) -> Callable[[Observed, Observed], Objective]:
        """What the student minimises, from the observed student and teacher."""
        if self.learn_from == "text":
            return lambda student, _: CrossEntropy(student.output("logits"), name="MaskedTokens")
        return partial(
            triple_loss,
            soft=self.soft_weight,
            masked=self.masked_weight,
            cosine=self.cosine_weight,
            temperature=self.temperature,
        )

    def claims(self) -> list[Claim]:
        common: dict[str, Any] = {
            "tasks": ["long-ner"],
            "tune_teacher": False,
            "length": 64,
            "attention_window": 8,
            "landmarks": 8,
        }
        common |= {"pretrain_steps": 20, "steps": 80, "tune_steps": 160}
        arms: dict[str, dict[str, Any]] = {
            "distilled": common,
            "from scratch": {**common, "begin": "random", "learn_from": "text"},
            "random beginning": {**common, "begin": "random"},
        }
        budget = "students of half the depth, 80 steps on the same masked text, then 160 steps on the task"
        claim = partial(Experiment("efficient-attention-kd", arms, budget).claim, method="distilled")
        far = ("F1 of whole entities whose type stands far away", "longformer student/long-ner")
        return [
            claim("a distilled Longformer student tags far entities better than one from scratch", *far,
                  baseline="from scratch"),
            claim("beginning with every second layer of the teacher is better than beginning at random", *far,
                  baseline="random beginning", scope="consequence"),
        ]  # fmt: skip
