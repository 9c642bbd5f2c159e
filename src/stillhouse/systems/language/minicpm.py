"""MiniCPM: rates found in a wind tunnel, a stable phase, better data in the decay."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate, Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.lr_schedules import Decay, decay_form, plan
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.pretraining import Pretraining, PretrainingSystem


@dataclass(kw_only=True)
class MiniCPM(PretrainingSystem):
    """MiniCPM: scalable training strategies (Hu et al., COLM 2024, arXiv 2404.06395).

    A tunnel of small models finds the rate (their scaling keeps it right at every width); a stable phase needs no
    horizon; its decay mixes in better data, on which the model is then fine-tuned. Optional: a scaling law from
    decays off one stable run per size, DPO, experts upcycled from the stable model, and longer contexts.
    """

    meta = Meta(
        card=116,
        title="MiniCPM",
        domain="language",
        family="training strategy",
        citation="Hu et al. (2024), MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training "
        "Strategies, COLM 2024, arXiv 2404.06395",
        feedback=("data", "preferences"),
        teacher_access="teacher-free",
        elicitation="curation",
        algorithm="supervised fine-tuning",
        knowledge="data",
        scheme="none",
        stages="tunnel + 4",
    )
    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "student": "layers=2,hidden_size=64,heads=4,intermediate_size=176",
        "steps": 400,
        "batch_size": 4,
        "base_width": 32,
        "eval_windows": 8,
        "halvings": 3.3,
        **{"tunnel_widths": (32, 64), "tunnel_steps": 80},
        **{"sft_steps": 40, "sft_lr": 1e-3},
    }
    smoke: ClassVar[dict[str, Any]] = {
        "student": "layers=1",
        "base_width": 8,
        "tunnel_widths": (8,),
        "tunnel_rates": (1e-2,),
        "tunnel_steps": 4,
        "decay": 0.2,
        "sft_steps": 4,
        "preferences": "demo",
        "dpo_epochs": 0.01,
        "experts": 4,
        "expert_steps": 4,
        "window": 64,
        "selection": 0.05,
    }

    decay: Annotated[float, "share of the steps in which the rate decays", Gt(0), Lt(1)] = 0.1
    form: Annotated[Decay, "shape of the decay"] = "exponential"
    halvings: Annotated[float, "how often the decay halves the rate: its steps / 5000 in the paper", Gt(0)] = 1.0
    mix: Annotated[float, "share of the decay's rows that are better data; 0: it stays plain", Ge(0), Lt(1)] = 0.25
    lr: Annotated[float, "peak rate of what is not a hidden matrix", Gt(0)] = 0.01
    warmup: Annotated[float, "share of the steps over which the rate rises", Ge(0), Lt(1)] = 0.01
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.1
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Lt(1)] = 0.95

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        work = Pretraining.begin(task, self)
        yield from work.choose_rate()
        steps, floor = self.steps or task.steps_of(self.epochs), 0.5**self.halvings
        shape: dict[str, Any] = {"form": decay_form(self.form, floor=floor), "floor": floor, "decay": self.decay}
        shape["warmup"] = round(self.warmup * steps)
        yield from work.scaling_law(steps, **shape)
        first, last = plan("wsd-s", [steps], **shape)
        stable = yield work.segment("stable", first, None)
        source = work.mixed(self.mix, last.begin) if self.mix else None
        base = yield work.segment("decay", last, stable, source=source)
        fine: dict[str, Any] = {"steps": self.sft_steps, "lr": self.sft_lr, "batch_size": self.batch_size}
        fine["read"] = work.better_rows(self.mix, last.end - last.begin)
        models = {"stable": stable, "decay": base, "student": (yield work.fine_tune("student", base, **fine))}
        models |= yield from work.variants(stable, models["student"])
        yield from work.dynamics([(first, None, stable), (last, stable, base)])
        yield Evaluate("quality", partial(work.figures, models))
        yield task.evaluation(models)

    def claims(self) -> list[Claim]:
        # Half of the decay's 80 batches is 40 batches of better data, which the plain arm gets in fine-tuning.
        same: dict[str, Any] = {"tunnel_widths": (), "decay": 0.2}
        mixed, plain = {"mix": 0.5, "sft_steps": 40}, {"mix": 0.0, "sft_steps": 80}
        arms = {"mixed decay": {**same, **mixed}, "plain decay": {**same, **plain}}
        budget = (
            "400 steps of pre-training, the same 320 rows of better data once each, equal peak rates; not equal: the "
            "plain arm has 40 more steps of fine-tuning and 160 more rows of text in its decay, and of better rows in "
            "the decay the questions are learnt too"
        )
        claim = partial(
            Experiment("minicpm", arms, budget, stage="quality").claim,
            method="mixed decay",
            baseline="plain decay",
            higher_is_better=False,
        )
        return [
            claim(
                "better data in the decay and in fine-tuning teach more than the same data in fine-tuning alone",
                "loss on held-out answers of the better data after fine-tuning, nats per token",
                "student/quality_loss",
            ),
            claim(
                "and forget less of the text",
                "loss on held-out text after fine-tuning, nats per token",
                "student/text_loss",
                scope="consequence",
            ),
        ]
