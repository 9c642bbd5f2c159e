"""SwiftKV: prompts stop half-way, because the upper layers' keys and values are made there."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.swiftkv import knowledge_preserved
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem
from stillhouse.tasks.swiftkv import COST, SwiftKVTask


@dataclass(kw_only=True)
class SwiftKV(LanguageSystem):
    """SwiftKV: fast prefill-optimized inference with knowledge-preserving model transformation (Qiao et al., 2024).

    arXiv 2410.03960. From layer ``first`` on, keys and values are made of that layer's normed input (SingleInputKV),
    and ``group`` layers share one pair (AcrossKV), so a prompt runs ``first`` layers. The new norm, the queries, the
    keys and the values are distilled from the original, which shares all other weights with them in one model.
    """

    meta = Meta(
        card=182,
        title="SwiftKV",
        domain="language",
        family="model surgery with self-distillation: cross-layer keys and values",
        citation="Qiao et al. (2024), SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model "
        "Transformation, arXiv 2410.03960",
        feedback=("logits", "features"),
        granularity=("token", "model"),
        elicitation="feature",
        algorithm=("divergence", "similarity"),
        knowledge=("response", "feature"),
        scheme="self",
        stages=3,
        role="compression",
    )
    demo: ClassVar = {**LanguageSystem.demo, "weight_decay": 0.0, "epochs": 1.0, "lr": 1e-3, "keep": "last"}
    smoke: ClassVar = {"first": 1, "group": 1, "baseline": True}

    student: Annotated[str, "not read: the student is the teacher with new keys and values"] = "scale:1.0"
    first: Annotated[int | None, "layers that keep their own keys and values; half of them by default", Ge(1)] = None
    group: Annotated[int, "upper layers that share one pair of keys and values", Ge(1)] = 1
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    hidden_weight: Annotated[float, "weight of the hidden state's squared error", Ge(0)] = 1.0
    hidden_layer: Annotated[int, "which hidden state, from the end: -1 the output, -2 the last layer's input"] = -2
    learn_from: Annotated[
        Literal["original", "text", "nothing"], "who teaches the new parts; text and nothing are for comparison"
    ] = "original"
    windows: Annotated[int | None, "learn from the first so many windows only: a few documents", Ge(1)] = None
    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 8192
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 8
    epochs: Annotated[float, "passes over the data", Gt(0)] = 1.0
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 2e-4
    lr_schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], "course of the learning rate"] = "linear"
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.05
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.0

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from SwiftKVTask.prepare_swiftkv(
            self, run, first=self.first, group=self.group, windows=self.windows
        )
        models = {"converted": (yield task.converted())}
        preserved = partial(
            knowledge_preserved,
            temperature=self.temperature,
            hidden_weight=self.hidden_weight,
            hidden_layer=self.hidden_layer,
            vocab_size=task.vocab_size,
        )
        if self.learn_from != "nothing":
            objective = preserved if self.learn_from == "original" else task.cross_entropy
            models["student"] = yield task.train("student", objective)
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models, more=task.cost, columns=COST)

    def claims(self) -> list[Claim]:
        # Some forty windows of the manual's first pages, read again and again: text that is narrower than what the
        # model was made for, as adaptation data are. The figures are taken on held-out pages of the whole manual.
        common = {"windows": 40, "steps": 60, "batch_size": 4, "baseline": False, "eval_windows": 8}
        arms: dict[str, dict[str, Any]] = {
            "distilled": common,
            "labels only": {**common, "learn_from": "text"},
            "converted only": {**common, "learn_from": "nothing"},
            "shared by three": {**common, "group": 3},
        }
        budget = "the same new parts trained for 60 steps on the same 40 windows, or not at all"
        claim = partial(Experiment("swiftkv", arms, budget).claim, method="distilled", higher_is_better=False)
        loss = ("loss on held-out text, nats per token", partial(_last, "val_loss"))
        kl = ("mean KL(original || model) on held-out text, nats per token", partial(_last, "kl"))
        return [
            claim("distilling from the original repairs what the surgery breaks", *loss, baseline="converted only"),
            claim("on narrow text the original preserves knowledge better than labels", *loss, baseline="labels only"),
            claim(
                "a distilled model stays closer to the original than one trained on labels", *kl, baseline="labels only"
            ),
            claim(
                "keys and values of their own are better than a pair for three layers",
                *loss,
                baseline="shared by three",
                scope="consequence",
            ),
        ]


def _last(name: str, figures: Mapping[str, float]) -> float:
    """A figure of the model that the arm ends with."""
    return figures.get(f"student/{name}", figures[f"converted/{name}"])
