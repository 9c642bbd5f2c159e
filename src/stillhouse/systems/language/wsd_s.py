"""WSD-S: checkpoints at several budgets from one run, whose decays are not thrown away."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Le, Lt, MinLen

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate, Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.objectives.lr_schedules import Decay, Method, Segment, decay_form, plan
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.landscape import Valley
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.segments import text_and_teacher, train_low, train_segments


@dataclass(kw_only=True)
class WSDS(LanguageSystem):
    """Warmup-stable-decay in a river valley (Wen et al., ICLR 2025, arXiv 2410.05192).

    A high rate goes far along the river and bounces on its hills; a decay takes the bounce away. WSD branches one off
    at every budget, WSD-S goes on from the decayed weights. Losses between checkpoints show hills and river. The
    paper's learning rates could not be verified.
    """

    meta = Meta(
        card=121,
        title="WSD-S",
        domain="language",
        family="training schedule",
        citation="Wen, Li, Wang, Hall, Liang and Ma (2025), Understanding Warmup-Stable-Decay Learning Rates: A River "
        "Valley Loss Landscape View, ICLR 2025, arXiv 2410.05192",
        feedback="data",
        teacher_access="teacher-free",
        algorithm="supervised fine-tuning",
        knowledge="data",
        scheme="none",
        stages="2 per checkpoint",
    )
    demo: ClassVar[dict[str, Any]] = {
        **LanguageSystem.demo,
        "student": "layers=2,hidden_size=64,heads=4,intermediate_size=176",
        "steps": 480,
        "batch_size": 4,
        "lr": 3e-3,
        "keep": "last",
        "eval_windows": 8,
        "schedules": ("wsd-s", "wsd", "cyclic-cosine"),
    }
    smoke: ClassVar[dict[str, Any]] = {"schedules": ("wsd-s", "wsd"), "targets": (0.5, 1.0), "decay": 0.2}

    schedules: Annotated[
        tuple[Method, ...], "what is run and compared; the last checkpoint of the first is the result", MinLen(1)
    ] = ("wsd-s",)
    targets: Annotated[
        tuple[Annotated[float, Gt(0), Le(1)], ...], "budgets of the checkpoints, as shares", MinLen(1)
    ] = (0.25, 0.5, 1.0)
    decay: Annotated[float, "length of a decay, as a share of its checkpoint's steps", Gt(0), Lt(1)] = 0.1
    form: Annotated[Decay, "shape of the decay"] = "inverse"
    floor: Annotated[float, "rate at the end of a decay, as a share of the peak", Ge(0), Le(1)] = 0.1
    low: Annotated[float | None, "a constant share of the peak beside the last decay; none: no", Gt(0), Le(1)] = None
    distil: Annotated[float, "weight of the teacher's distribution; 0: the text alone", Ge(0), Le(1)] = 0.0
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.01
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 6e-4

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        steps = self.steps or task.steps_of(self.epochs)
        models: dict[str, Artifact] = {}
        for number, method in enumerate(self.schedules):
            segments = self.plan(method, steps)
            names = {} if number else {segments[-1].name: self.product}
            how: dict[str, Any] = {"prefix": f"{method}-", "objective": partial(text_and_teacher, task, self.distil)}
            left = yield from train_segments(task, segments, names=names, **how)
            ends = {s.target: left[s.name] for s in segments if s.target is not None}
            models |= {f"{method} {share:.0%}": ends[target] for target, share in enumerate(sorted(self.targets))}
            if self.low is not None:
                models |= yield from train_low(task, segments, left, self.low, **how)
            if len(self.targets) > 1:
                stable = [left[s.name] for s in segments if s.target is None]
                lines = {"stable": stable, "decayed": [ends[target] for target in sorted(ends)]}
                yield Evaluate(f"{method}-landscape", partial(Valley(task).measure, lines))
        yield task.evaluation(models)

    def plan(self, method: Method, steps: int) -> list[Segment]:
        """The segments of one schedule over a budget of ``steps``."""
        form = decay_form(self.form, floor=self.floor)
        targets = [round(share * steps) for share in sorted(self.targets)]
        return plan(method, targets, form=form, floor=self.floor, decay=self.decay, warmup=round(self.warmup * steps))

    def claims(self) -> list[Claim]:
        def arms(*methods: Method, targets: tuple[float, ...]) -> dict[str, dict[str, Any]]:
            return {method: {"schedules": (method,), "targets": targets} for method in methods}

        def mean_loss(figures: Mapping[str, float]) -> float:
            found = [value for key, value in figures.items() if key.endswith("%/val_loss")]
            return sum(found) / len(found)

        def last_loss(figures: Mapping[str, float]) -> float:
            return figures.get("wsd low rate/val_loss", figures["wsd 100%/val_loss"])

        budget = "equal steps up to every checkpoint, peak rates, batches and initial weights"
        three = Experiment("wsd-s", arms("wsd-s", "wsd", "cyclic-cosine", targets=(0.25, 0.5, 1.0)), budget)
        one = Experiment("wsd-s", arms("wsd", "cosine-runs", "cosine-cut", "constant", targets=(1.0,)), budget)
        low_rate = {"schedules": ("wsd",), "targets": (1.0,), "low": 0.1}
        beside = Experiment("wsd-s", {**arms("wsd", targets=(1.0,)), "low rate": low_rate}, budget)
        several = "mean loss on held-out text over the checkpoints at 25, 50 and 100 % of the budget, nats per token"
        final = "loss on held-out text at the end, nats per token"
        better = partial(three.claim, metric=several, figure=mean_loss, method="wsd-s", higher_is_better=False)
        final_loss: dict[str, Any] = {
            "metric": final,
            "method": "wsd",
            "higher_is_better": False,
            "scope": "consequence",
        }
        ends: Callable[..., Claim] = partial(one.claim, figure=mean_loss, **final_loss)
        lower: Callable[..., Claim] = partial(beside.claim, figure=last_loss, **final_loss)
        return [
            better("WSD-S makes better checkpoints than WSD, whose decays are thrown away", baseline="wsd"),
            better("WSD-S makes better checkpoints than cosines restarted after each", baseline="cyclic-cosine"),
            ends("a constant rate with a short decay beats the constant rate alone", baseline="constant"),
            ends("it beats a cosine made for twice the budget and cut half-way", baseline="cosine-cut"),
            ends("it beats a cosine made for this budget", baseline="cosine-runs"),
            lower("from stable weights a decay goes lower in its steps than a low constant rate", baseline="low rate"),
        ]
