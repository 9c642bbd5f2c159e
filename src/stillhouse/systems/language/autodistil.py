"""AutoDistil: a few compact super-networks, distilled once, from which any budget finds its student."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.models.subspaces import SPACES, SubSpace
from stillhouse.objectives.relations import RelationForm
from stillhouse.tasks.elastic import Budget, ElasticTask, Search, mean_relation_loss
from stillhouse.tasks.encoder import EncoderSystem
from stillhouse.tasks.encoder_transfer import fine_tuning, labelled_task, ranking
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.text_classification import TextClassificationTask


@dataclass(kw_only=True)
class AutoDistil(EncoderSystem):
    """Few-shot task-agnostic architecture search for distilling encoders (Xu et al., 2022, arXiv 2201.12507).

    The search space is cut into compact sub-spaces; each gets one super-network that shares the weights of all its
    sub-networks, distilled on the teacher's self-attention relations. Held-out relation loss then picks the best
    sub-network under a budget without training any, which is distilled on if wished, and fine-tuned.
    """

    meta = Meta(
        card=81,
        title="AutoDistil",
        domain="language",
        family="elastic super-networks, relation KD, architecture search",
        citation="Xu et al. (2022), Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language "
        "Models, NeurIPS 2022, arXiv 2201.12507",
        feedback=("relations", "labels"),
        granularity=("token", "model"),
        elicitation="feature",
        algorithm=("similarity", "search"),
        knowledge="relation",
        stages="super-networks, search, fine-tuning",
        role="smaller models",
        skill="understanding",
    )
    demo: ClassVar = {
        **EncoderSystem.demo,
        "spaces": (
            "large: layers=4-6 heads=4-6 hidden=64-80 ratio=3-4",
            "tiny: layers=2-3 heads=2-3 hidden=16-32 ratio=2-3",
        ),
        "choices": 2,
        "relation_heads": 6,
        "steps": 600,
        "max_parameters": 300_000,
        "finetune_steps": 200,
        "finetune_lr": 1e-3,
        "glue": ("demo",),
        "glue_examples": 300,
    }
    smoke: ClassVar = {
        "demo_steps": 10,
        "steps": 24,
        "window": 16,
        "batch_size": 4,
        "eval_windows": 8,
        "search": "proxy",
        "finalists": 2,
        "proxy_steps": 4,
        "continue_steps": 12,
        "finetune_steps": 12,
        "finetune_batch_size": 4,
        "probes": ("2/2/16/2",),
        "ranked": 3,
        "ranked_steps": 4,
        "glue_examples": 32,
    }

    spaces: Annotated[tuple[str, ...], "sub-spaces, NAME: layers=4-7 heads=7-10 hidden=128-224 ratio=2-3.5"] = SPACES
    choices: Annotated[int, "values of each range of a sub-space", Ge(1)] = 4
    sandwich: Annotated[bool, "the largest and the smallest sub-network in every step; off: all are drawn"] = True
    drawn: Annotated[int, "sub-networks drawn at random in every step, beside those two", Ge(1)] = 2
    relation_heads: Annotated[int, "heads that relations are computed in", Ge(1)] = 12
    relation: Annotated[RelationForm, "mse of unnormalised relations (the code), or kl of normalised ones (paper)"] = (
        "mse"
    )
    epochs: Annotated[float, "passes over the text of each super-network", Gt(0)] = 15.0
    steps: Annotated[int | None, "steps of all super-networks together; by default what epochs asks", Ge(1)] = None
    search: Annotated[Search, "choose by relation loss, or among the best few by a task"] = "agnostic"
    max_parameters: Annotated[int | None, "budget: most parameters of the student, embeddings in", Gt(0)] = None
    max_megaflops: Annotated[float | None, "budget: most MFLOPs of its layers for one sequence", Gt(0)] = None
    finalists: Annotated[int, "sub-networks that a proxy search fine-tunes", Ge(1)] = 4
    proxy_steps: Annotated[int, "steps in which each of them is", Ge(1)] = 1000
    continue_steps: Annotated[int, "steps in which the student found is distilled on", Ge(0)] = 0
    finetune_epochs: Annotated[float, "passes of fine-tuning", Gt(0)] = 20.0
    finetune_steps: Annotated[int | None, "steps of fine-tuning; by default what the epochs need", Ge(1)] = None
    finetune_lr: Annotated[float, "learning rate of fine-tuning", Gt(0)] = 2e-5
    finetune_batch_size: Annotated[int, "sequences in a batch of fine-tuning", Ge(1)] = 32
    glue: Annotated[tuple[str, ...], "labelled text to fine-tune on too: files, folders, nyu-mll/glue:rte, demo"] = ()
    glue_examples: Annotated[int | None, "labelled examples at most; none: all", Ge(8)] = None
    ranked: Annotated[int, "sub-networks to train alone, to see whether inherited losses rank them", Ge(0)] = 0
    ranked_steps: Annotated[int, "steps in which each of them is", Ge(1)] = 1000
    probes: Annotated[tuple[str, ...], "more sub-networks to report on, layers/heads/hidden/ratio"] = ()

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        spaces = SubSpace.parse_all(self.spaces, choices=self.choices)
        task = yield from ElasticTask.prepare(self, run, heads=self.relation_heads, form=self.relation)
        steps = max(1, self.steps // len(spaces)) if self.steps else task.steps_of(self.epochs)
        homes: dict[str, Artifact] = {}
        for space in spaces:
            homes[space.name] = yield task.super_network(space, steps=steps, drawn=self.drawn, extremes=self.sandwich)
        budget = Budget(self.max_parameters, self.max_megaflops)
        candidates = yield from task.search(homes, spaces, budget)
        best = candidates[0]
        if self.search == "proxy":
            finalists = candidates[: self.finalists]
            best = yield from task.try_out(homes, finalists, steps=self.proxy_steps, lr=self.finetune_lr)
        found = yield Transform("found", partial(task.cut, homes, best), save=task.save)
        if self.continue_steps:
            found = yield task.continued("continued", found, steps=self.continue_steps)
        size = self.finetune_batch_size
        steps = self.finetune_steps or task.steps_of(self.finetune_epochs, batch_size=size)
        student = yield task.finetune("student", found, steps=steps, lr=self.finetune_lr, batch_size=size)
        yield Evaluate("evaluation", partial(task.evaluation, homes, spaces, {"student": student}, found, self.probes))
        labelled = [self._labelled(task, data) for data in self.glue]
        for number, one in enumerate(labelled):
            yield from fine_tuning(task, one, found, f"glue-{number + 1}")
        if self.ranked:
            first = labelled[0] if labelled else None
            yield from ranking(task, homes, spaces, first, count=self.ranked, steps=self.ranked_steps)

    def _labelled(self, task: ElasticTask, data: str) -> TextClassificationTask:
        return labelled_task(
            task,
            data,
            lr=self.finetune_lr,
            epochs=self.finetune_epochs,
            steps=self.finetune_steps,
            batch_size=self.finetune_batch_size,
            examples=self.glue_examples,
        )

    def claims(self) -> list[Claim]:
        tiny, large = ("2/2/16/2", "3/3/32/3"), ("4/4/64/3", "6/6/80/4")
        union = "union: layers=2-6 heads=2-6 hidden=16-80 ratio=2-4"
        common = {"probes": (*tiny, *large), "steps": 300, "eval_windows": 64, "finetune_steps": 1, "glue": ()}
        arms = {
            "two sub-spaces": common,
            "one space": {**common, "spaces": (union,), "choices": 5},
            "all drawn": {**common, "sandwich": False},
        }
        budget = "300 steps of four sub-networks in all super-networks together; equal batches and learning rates"
        claim = partial(Experiment("autodistil", arms, budget).claim, method="two sub-spaces", higher_is_better=False)
        return [
            claim(
                "small sub-networks come closer to the teacher in a super-network of their own compact sub-space "
                "than in one super-network over the whole space",
                "held-out relation loss, mean of the smallest and the largest sub-network of the tiny sub-space",
                mean_relation_loss(tiny),
                baseline="one space",
            ),
            claim(
                "with the largest and the smallest sub-network in every step, the extremes of the sub-spaces "
                "come closer to the teacher than with all drawn at random",
                "held-out relation loss, mean over the smallest and the largest sub-network of both sub-spaces",
                mean_relation_loss((*tiny, *large)),
                baseline="all drawn",
                scope="consequence",
            ),
        ]
