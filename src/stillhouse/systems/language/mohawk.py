"""MOHAWK: attention becomes state space, matched from the mixing matrices up to the whole model."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import ForwardKL
from stillhouse.models.conversion import Inherit
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.objectives.layerwise import hidden_alignment, matrix_orientation
from stillhouse.tasks.converted import Aligned, ConvertedTask, Embedded, stage_arms
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem


@dataclass(kw_only=True)
class MOHAWK(LanguageSystem):
    """Transformers to SSMs: distilling quadratic knowledge to subquadratic models (Bick et al., 2024, 2408.10189).

    The student is the teacher with a state-space mixer in place of each attention; all else is carried over, and the
    field ``student`` is not read. Stage 1 turns each mixer's matrix to the teacher's attention map, stage 2 brings its
    output to the attention's, both on the teacher's inputs to the layer; stage 3 distils the whole model on logits.
    """

    meta = Meta(
        card=131,
        title="MOHAWK",
        domain="language",
        family="cross-architecture KD: attention to state space",
        citation="Bick et al. (2024), Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models, "
        "NeurIPS 2024, arXiv 2408.10189",
        feedback=("relations", "features", "logits"),
        granularity=("token", "model"),
        elicitation="feature",
        algorithm=("similarity", "divergence"),
        knowledge=("relation", "feature", "response"),
        stages=4,
        role="compression",
    )
    demo: ClassVar = {
        **LanguageSystem.demo,
        "window": 64,
        "batch_size": 16,
        "state_size": 16,
        "orientation": 1 / 6,
        "alignment": 1 / 3,
    }
    smoke: ClassVar = {"state_size": 4, "orientation": 0.25, "alignment": 0.25, "attention_layers": [0]}

    student: Annotated[str, "not read: the student is the teacher with its attention replaced"] = "scale:1.0"
    orientation: Annotated[float, "share of the steps in stage 1, on mixing matrices", Ge(0), Lt(1)] = 0.08 / 3
    alignment: Annotated[float, "share of the steps in stage 2, on hidden states", Ge(0), Lt(1)] = 0.16 / 3
    state_size: Annotated[int, "size of a head's state", Ge(1)] = 64
    conv_width: Annotated[int, "taps of the short convolutions", Ge(1)] = 4
    attention_layers: Annotated[list[int] | None, "layers that keep their attention, such as 5,11,17,23"] = None
    inherit: Annotated[Inherit, "what mixers get from the attention: nothing, W_V and W_O, or all projections"] = "none"
    align: Annotated[Aligned, "stage 2 compares the outputs of the mixers, or of whole layers"] = "mixer"
    orientation_window: Annotated[int | None, "tokens of a window that stage 1 reads; maps are quadratic in it"] = None
    temperature: Annotated[float, "softens both distributions in stage 3", Gt(0)] = 1.0
    alpha: Annotated[float, "weight of the teacher in stage 3; the labels get the rest", Ge(0), Le(1)] = 1.0
    lr_schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], "course of each stage's rate"] = "wsd"
    warmup: Annotated[float, "share of a stage over which the learning rate rises", Ge(0), Lt(1)] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.1
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Lt(1)] = 0.95
    embedded: Annotated[Embedded, "the embedded task: words, or a smaller teacher of characters"] = "words"

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        if self.orientation + self.alignment >= 1:
            raise ConfigError("mohawk: orientation and alignment together must leave steps for stage 3 (below 1)")
        task = yield from ConvertedTask.prepare(self, run, embedded=self.embedded)
        latest = converted = yield task.converted(
            self.attention_layers or [], state_size=self.state_size, conv_width=self.conv_width, inherit=self.inherit
        )
        total = self.steps or task.steps_of(self.epochs)
        first, second = (round(share * total) for share in (self.orientation, self.alignment))
        if first:
            latest = yield task.layerwise(
                "orientation", latest, matrix_orientation, give="matrix", steps=first, window=self.orientation_window
            )
        if second:
            latest = yield task.layerwise("alignment", latest, hidden_alignment, give=self.align, steps=second)
        task.begin_as(latest)
        teacher, divergence = head_of(task.observed_teacher()), ForwardKL(temperature=self.temperature)
        weights: dict[str, Any] = {"divergence_weight": self.alpha, "cross_entropy": 1 - self.alpha}
        student = yield task.train(
            "student",
            lambda student: TokenMatch(head_of(student), teacher, divergence, vocab_size=task.vocab_size, **weights),
            steps=total - first - second,
        )
        models = {"student": student}
        if self.baseline:
            task.begin_as(converted)
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        # A teacher's weights in the mixers would be a head start that hides what the stages do: they begin at random.
        common = {"eval_windows": 16, "baseline": False, "keep": "last", "inherit": "none"}
        few, many = {"steps": 120, "batch_size": 8}, {"steps": 450, "embedded": "characters"}  # many: the card's check
        kl = ("mean KL(teacher || student) on held-out text, nats per token", "student/kl")
        claims = []
        for values, on, where in ((few, "", ""), (many, ", characters", ", in a small model of characters")):
            budget = f"{values['steps']} steps in all stages together, equal batches, learning rates and initial mixers"
            experiment = Experiment("mohawk", stage_arms(on, **common, **values), budget)
            claim = partial(experiment.claim, method=f"three stages{on}", higher_is_better=False)
            alone = (
                "matching mixing matrices and hidden states first brings the state-space student closer to its "
                f"attention teacher than distilling the logits alone{where}"
            )
            before = (
                f"matching the mixing matrices before the hidden states is better than the hidden states alone{where}"
            )
            claims.append(claim(alone, *kl, baseline=f"stage 3 alone{on}"))
            claims.append(claim(before, *kl, baseline=f"stages 2 and 3{on}"))
        return claims
