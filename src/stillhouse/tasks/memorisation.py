"""Language tasks whose text is asked for again: a teacher that learns it, how it goes on, and the audit of the models.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from stillhouse.audits.memorisation import (
    Peeled,
    exposure,
    greedy_continuations,
    memorisation_audit,
    onion,
    outer_layer,
)
from stillhouse.base.table import Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Audit, Context, Generate, Stage
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.data.windows import WindowSplit
from stillhouse.tasks.language import LanguageTask


def taught(task: LanguageTask, epochs: float) -> Generator[Stage, Artifact, nn.Module]:
    """The task's teacher after so many passes over the training text; yields the stage that trains a copy of it.

    The system's ``steps`` are the students'.
    """
    large = replace(task, new_student=lambda: deepcopy(task.teacher).float().requires_grad_(True))
    artifact = yield large.train("teacher", task.cross_entropy, steps=task.steps_of(epochs))
    return task.load(artifact)


def continued(task: LanguageTask, sequences_NT: Tensor, prefix: int) -> Generator[Stage, Artifact, Tensor]:
    """The teacher's greedy continuations of all prefixes, each as long as the sequence was: (N, T)."""
    more = sequences_NT.shape[1] - prefix

    def write(left: Mapping[str, list[int]]) -> Iterator[tuple[str, dict[str, list[int]]]]:
        keys = list(left)
        for start in range(0, len(keys), 64):
            part = torch.tensor([left[key] for key in keys[start : start + 64]])
            found = torch.cat([part, greedy_continuations(task.teacher, part, more)], 1)
            yield from zip(keys[start : start + 64], ({"tokens": row} for row in found.tolist()), strict=True)

    import pyarrow.parquet as pq

    requests = {str(number): row for number, row in enumerate(sequences_NT[:, :prefix].tolist())}
    written = yield Generate("continuations", requests, write, together=True)
    return torch.tensor(pq.read_table(written.data_file())["tokens"].to_pylist())


def train_on(task: LanguageTask, name: str, objective: Callable[[Observed], Objective], sequences_NT: Tensor) -> Train:
    """A stage that trains a new student on these sequences in place of the task's."""
    stage = task.train(name, objective)
    windows, system = WindowSplit({"input_ids": sequences_NT}), task.system
    stage.source = Batches(windows, system.batch_size, seed=system.seed, gather=True)
    return stage


def extraction(
    task: LanguageTask,
    sequences_NT: Tensor,
    name: str,
    artifacts: Mapping[str, Artifact],
    *,
    prefix: int,
    suffix: int,
    repeats: int,
) -> Audit:
    """The audit of the task's teacher and of the models that stages left: see `memorisation_audit`."""

    def load() -> dict[str, nn.Module]:
        teacher = task.teacher.to(task.run.fabric.device)
        return {"teacher": teacher, **{label: task.load(artifact) for label, artifact in artifacts.items()}}

    def texts() -> list[str]:
        return task.tokenizer.batch_decode(sequences_NT)

    return memorisation_audit(name, load, sequences_NT, texts, prefix=prefix, suffix=suffix, repeats=repeats)


def peeled(
    task: LanguageTask,
    sequences_NT: Tensor,
    student: Artifact,
    train: Callable[..., Train],
    layers: int,
    share: float,
    *,
    prefix: int,
    suffix: int,
) -> Generator[Stage, Artifact, None]:
    """Take the most exposed memorised sequences away and train anew, ``layers`` times; a table of who is memorised.

    Args:
        student: the model that has seen all sequences.
        train: with ``name`` and ``kept``, a stage that trains its like on the sequences of the mask ``kept`` (N).
        share: of the memorised, that a layer takes away.
    """

    def look(artifact: Artifact, context: Context) -> dict[str, list[float]]:
        memorised, likely = exposure(task.load(artifact), sequences_NT, prefix=prefix, suffix=suffix)
        context.results = {"memorised": float(memorised.float().mean())}
        return {"memorised": memorised.int().tolist(), "log_probability": likely.tolist()}

    removed = torch.zeros(len(sequences_NT), dtype=torch.bool)
    found: list[Peeled] = []
    for layer in range(layers + 1):
        seen = (yield Audit(f"exposed-{layer}", partial(look, student))).json()
        memorised = torch.tensor(seen["memorised"]).bool()
        found.append(Peeled(removed.clone(), memorised))
        outer = outer_layer(memorised & ~removed, torch.tensor(seen["log_probability"]), share)
        if layer == layers or not outer.any():
            break
        removed |= outer
        student = yield train(name=f"peeled-{layer + 1}", kept=~removed)

    def table(context: Context) -> Table:
        made = onion(found)
        context.results = {
            f"{number}/{key}": float(value)
            for number, row in enumerate(made.rows)
            for key, value in row.items()
            if key != "name"
        }
        return made

    yield Audit("onion", table)
