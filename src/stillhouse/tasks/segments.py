"""Training in segments: each goes on from weights, optimizer moments and place in the text that another one left.

Segments in a row are the same as one run, bit for bit on a CPU; segments with one beginning are its branches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillhouse.base.sharded import load_optimizer_state
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import OptimizerFactory
from stillhouse.core.stage import Stage
from stillhouse.core.train import Train
from stillhouse.losses.divergences import ForwardKL
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.objectives.lr_schedules import Segment, low_branch
from stillhouse.tasks.language import LanguageTask

MOMENTS = "optimizer/moments.safetensors"


@dataclass(eq=False)
class Carried:
    """An optimizer that goes on with the moments an earlier stage left, and leaves its own.

    Args:
        factory: makes the optimizer; its learning rate and other settings count, not those saved.
        start: the artifact folder whose moments it begins with; None begins with none.

    For one process, or several that hold whole optimizers: sharded states are not gathered.
    """

    factory: OptimizerFactory
    start: Path | None = None
    made: torch.optim.Optimizer | None = None

    def __call__(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        self.made = self.factory(groups)
        if self.start is not None:
            state: dict[str, Any] = {**self.made.state_dict(), "state": {}}
            for key, tensor in load_file(self.start / MOMENTS).items():
                index, _, name = key.partition(".")
                state["state"].setdefault(int(index), {})[name] = tensor
            load_optimizer_state(self.made, state)
        return self.made

    def saving(self, save: Saver) -> Saver:
        """``save``, and the moments beside what it writes."""

        def both(model: Any, folder: Path) -> None:
            assert self.made is not None
            save(model, folder)
            (folder / MOMENTS).parent.mkdir()
            state = self.made.state_dict()["state"]
            tensors = {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / MOMENTS)

        return both


def segment_stage(
    task: LanguageTask,
    segment: Segment,
    start: Artifact | None,
    *,
    name: str,
    objective: Callable[[Observed], Objective],
    optimizer: Callable[[nn.Module], OptimizerFactory] | None = None,
    source: Any = None,
) -> Train:
    """The stage that trains one segment of a student.

    Args:
        start: what the segment that it goes on from left; None begins with a new student.
        optimizer: makes the optimizer's factory for the model; by default the task's AdamW.
        source: a source in place of the task's, which is moved on to where the segment begins.
    """
    if start is not None:
        task = task.beginning_as(start)
    stage = task.train(name, objective, steps=segment.end - segment.begin)
    player = stage.players
    assert not callable(player) and not isinstance(player, Sequence) and stage.save is not None
    factory = player.optimizer if optimizer is None else optimizer(player.trained[0].module)
    carried = Carried(factory, None if start is None else start.path)
    player.optimizer, player.lr, stage.save = carried, segment.rate, carried.saving(stage.save)
    stage.best = None  # a segment ends where it ends
    if source is None:
        move_on(stage.source, segment.begin * task.system.accumulate)
    else:
        stage.source = source
    return stage


def move_on(source: Any, batches: int) -> None:
    """Put a source of batches to where it stands after so many."""
    source.load_state_dict({"epoch": batches // len(source), "position": batches % len(source)})


def train_segments(
    task: LanguageTask,
    segments: Sequence[Segment],
    *,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> Generator[Stage, Artifact, dict[str, Artifact]]:
    """Yield the stages of a plan; gives what each segment left, by its name.

    Args:
        prefix: put before the segments' names to name their stages.
        names: names of the stages of some segments.
        options: see `segment_stage`.
    """
    left: dict[str, Artifact] = {}
    for segment in segments:
        start = None if segment.start is None else left[segment.start]
        name = (names or {}).get(segment.name, prefix + segment.name)
        left[segment.name] = yield segment_stage(task, segment, start, name=name, **options)
    return left


def train_low(
    task: LanguageTask,
    segments: Sequence[Segment],
    left: Mapping[str, Artifact],
    rate: float,
    *,
    prefix: str,
    **options: Any,
) -> Generator[Stage, Artifact, dict[str, Artifact]]:
    """Yield the stage of `low_branch`, if the plan has one; gives what it left, by the name to show.

    Args:
        left: what `train_segments` gave.
        prefix, options: as for `train_segments`.
    """
    low = low_branch(segments, rate)
    if low is None or low.start is None:
        return {}
    stage = segment_stage(task, low, left[low.start], name=prefix + low.name, **options)
    return {f"{prefix[:-1]} low rate": (yield stage)}


def text_and_teacher(task: LanguageTask, share: float, student: Observed, teacher: Observed | None = None) -> Objective:
    """(1 - share) cross-entropy of the text + share KL(teacher || student), over all tokens at temperature 1.

    ``teacher``: by default the task's; it is not run where ``share`` is 0.
    """
    if not share:
        return task.cross_entropy(student)
    head = head_of(teacher or task.observed_teacher())
    return TokenMatch(
        head_of(student),
        head,
        ForwardKL(),
        divergence_weight=share,
        cross_entropy=1 - share,
        vocab_size=task.vocab_size,
    )
