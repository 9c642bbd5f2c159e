"""AutoDistil: a few compact super-networks, distilled once, from which any budget finds its student."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.models.elastic import load_encoder
from stillhouse.models.subspaces import SubSpace
from stillhouse.objectives.relations import RelationForm
from stillhouse.tasks.elastic import Budget, ElasticTask
from stillhouse.tasks.encoder import EncoderSystem, EncoderTask

SPACES = (
    "base: layers=9-12 heads=9-12 hidden=544-640 ratio=2.5-4",
    "small: layers=9-12 heads=7-10 hidden=256-352 ratio=2.5-4",
    "tiny: layers=4-7 heads=7-10 hidden=128-224 ratio=2-3.5",
)


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
    search: Annotated[Literal["agnostic", "proxy"], "choose by relation loss, or among the best few by a task"] = (
        "agnostic"
    )
    max_parameters: Annotated[int | None, "budget: most parameters of the student, embeddings in", Gt(0)] = None
    max_megaflops: Annotated[float | None, "budget: most MFLOPs of its layers for one sequence", Gt(0)] = None
    finalists: Annotated[int, "sub-networks that a proxy search fine-tunes", Ge(1)] = 4
    proxy_steps: Annotated[int, "steps in which each of them is", Ge(1)] = 1000
    continue_steps: Annotated[int, "steps in which the student found is distilled on", Ge(0)] = 0
    finetune_epochs: Annotated[float, "passes of fine-tuning", Gt(0)] = 20.0
    finetune_steps: Annotated[int | None, "steps of fine-tuning; by default what the epochs need", Ge(1)] = None
    finetune_lr: Annotated[float, "learning rate of fine-tuning", Gt(0)] = 2e-5
    finetune_batch_size: Annotated[int, "sequences in a batch of fine-tuning", Ge(1)] = 32
    probes: Annotated[tuple[str, ...], "more sub-networks to report on, layers/heads/hidden/ratio"] = ()

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        spaces = [SubSpace.parse(text, choices=self.choices) for text in self.spaces]
        if len({space.name for space in spaces}) < len(spaces) or not spaces:
            raise ConfigError("spaces: give at least one sub-space, each with a name of its own")
        task = yield from EncoderTask.prepare(self, run)
        task = ElasticTask.of(task, heads=self.relation_heads, form=self.relation)
        steps = max(1, self.steps // len(spaces)) if self.steps else task.steps_of(self.epochs)
        homes: dict[str, Artifact] = {}
        for space in spaces:
            homes[space.name] = yield task.super_network(
                f"super-{space.name}", space, steps=steps, drawn=self.drawn, extremes=self.sandwich
            )
        budget = Budget(self.max_parameters, self.max_megaflops)
        searched = yield Evaluate("search", lambda context: task.search(homes, spaces, budget, context))
        candidates = searched.json("candidates.json")
        best = candidates[0]
        if self.search == "proxy":
            scores: list[tuple[float, int]] = []
            for place, row in enumerate(candidates[: self.finalists]):
                cut = yield Transform(f"cut-{place + 1}", partial(task.cut, homes, row), save=task.save)
                model = load_encoder(cut.path, masked_lm=True)
                tried = yield task.fill_in(f"proxy-{place + 1}", model, steps=self.proxy_steps, lr=self.finetune_lr)
                scores.append((tried.metrics["masked_loss"], place))
            best = candidates[min(scores)[1]]
        found = yield Transform("found", partial(task.cut, homes, best), save=task.save)
        if self.continue_steps:
            found = yield task.continued("continued", found, steps=self.continue_steps)
        student = yield task.fill_in(
            "student",
            load_encoder(found.path, masked_lm=True),
            steps=self.finetune_steps or task.steps_of(self.finetune_epochs, batch_size=self.finetune_batch_size),
            lr=self.finetune_lr,
            batch_size=self.finetune_batch_size,
        )
        models = {"student": student}
        yield Evaluate("evaluation", partial(task.evaluation, homes, spaces, models, found, self.probes))

    def claims(self) -> list[Claim]:
        tiny, large = ("2/2/16/2", "3/3/32/3"), ("4/4/64/3", "6/6/80/4")
        union = "union: layers=2-6 heads=2-6 hidden=16-80 ratio=2-4"
        common = {"probes": (*tiny, *large), "steps": 300, "eval_windows": 64, "finetune_steps": 1}

        def mean_of(probes: tuple[str, ...], artifacts: Mapping[str, Artifact]) -> float:
            found = artifacts["evaluation"].metrics
            return sum(found[f"{probe}/relation_loss"] for probe in probes) / len(probes)

        central = Claim(
            statement="small sub-networks come closer to the teacher in a super-network of their own compact sub-space "
            "than in one super-network over the whole space",
            metric="held-out relation loss, mean of the smallest and the largest sub-network of the tiny sub-space",
            method="two sub-spaces",
            baseline="one space",
            variants={
                "two sub-spaces": ("autodistil", common),
                "one space": ("autodistil", {**common, "spaces": (union,), "choices": 5}),
            },
            measure=partial(mean_of, tiny),
            higher_is_better=False,
            seeds=3,
            budget="300 steps of four sub-networks in all super-networks together; equal batches and learning rates",
        )
        sandwich = replace(
            central,
            statement="with the largest and the smallest sub-network in every step, the extremes of the sub-spaces "
            "come closer to the teacher than with all drawn at random",
            metric="held-out relation loss, mean over the smallest and the largest sub-network of both sub-spaces",
            method="two sub-spaces",
            baseline="all drawn",
            variants={
                "two sub-spaces": ("autodistil", common),
                "all drawn": ("autodistil", {**common, "sandwich": False}),
            },
            measure=partial(mean_of, (*tiny, *large)),
            scope="consequence",
        )
        return [central, sandwich]
