"""Longer contexts for a pre-trained model: phases on longer and longer documents, each with a larger RoPE base."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.player import Player
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.train import Train
from stillhouse.data.length_curriculum import TokenShares, documents_of, padded, rows_between
from stillhouse.data.sources import Batches
from stillhouse.data.text import load_text
from stillhouse.data.windows import WindowSplit, tokenize_windows
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.rope import ntk_base, rope_base, with_rope_base
from stillhouse.tasks.language import LanguageTask

if TYPE_CHECKING:
    from stillhouse.tasks.pretraining import Pretraining, PretrainingSystem


def phase_base(config: Any, phase: int, *, factor: float, adjusted: float) -> float:
    """RoPE's base in a phase, counted from 1, that makes the context ``factor`` times as long.

    The first phase multiplies it with ``adjusted`` (adjusted base frequency, Xiong et al., 2023, arXiv 2309.16039: from
    10,000 to 500,000); later ones scale it by NTK (`ntk_base`).
    """
    base, dims = rope_base(config)
    return base * adjusted if phase == 1 else ntk_base(base, factor, dims)


def extended(work: Pretraining, stable: Artifact) -> Generator[Stage, Artifact, dict[str, Artifact]]:
    """Go on from the stable model in a phase for each of the system's ``long_windows``, if it has any.

    In a phase ``long_share`` of the tokens are of documents with more tokens than the last window and at most as many
    as the phase's (longer ones are cut); the rest are the text's windows. The rate is that of the stable phase and
    decays in the last one. (MiniCPM: 4 to 32K tokens, then 32 to 128K.)
    """
    system, task = work.system, work.task
    if not system.long_windows:
        return {}
    lengths = [system.window, *system.long_windows]
    left = {"stable": stable}
    for phase, rows in enumerate(long_rows(task, system), 1):
        lower, upper = lengths[phase - 1 : phase + 1]
        each, seed = max(1, system.batch_size * system.window // upper), system.seed + phase
        long = Batches(rows, each, seed=seed, collate=padded)
        short = Batches(task.windows.train, system.batch_size, seed=seed, gather=True)
        stage = _phase(work, phase, list(left.values())[-1], upper / lower, upper)
        stage.source = TokenShares(long, short, system.long_share)
        left[f"long-{phase}"] = yield stage
    yield Evaluate("long-context", partial(_losses_by_length, task, left, lengths))
    return {"long": list(left.values())[-1]}


def long_rows(task: LanguageTask, system: PretrainingSystem) -> list[list[Tensor]]:
    """The long rows of each phase.

    Raises:
        ConfigError: windows that do not rise, or longer than all documents.
    """
    lengths = [system.window, *system.long_windows]
    if any(later <= before for before, later in itertools.pairwise(lengths)):
        raise ConfigError(f"long_windows={system.long_windows}: must rise from above window={system.window}")
    text = _long_text(task, system.long_data)
    documents = documents_of(text[:]["input_ids"], end=task.tokenizer.eos_token_id)
    try:
        return [rows_between(documents, lower, upper) for lower, upper in itertools.pairwise(lengths)]
    except DataError as error:
        raise ConfigError(f"long_windows: {error}") from error


def _long_text(task: LanguageTask, source: str | None) -> WindowSplit:
    """The stream that long documents are taken from: the training text's, or that of another source."""
    if source is None and task.windows.kind != "text":
        raise ConfigError("long_windows: data holds conversations; give long documents as long_data")
    if source is None:
        return task.windows.train
    data = load_text(source)
    if data.kind != "text":
        raise ConfigError(f"long_data={source}: conversations; give plain documents")
    return tokenize_windows(data, task.tokenizer, window=task.system.window, validation=1).train


def _phase(work: Pretraining, phase: int, start: Artifact, factor: float, positions: int) -> Train:
    """The stage of one phase, but for its batches."""
    system, path = work.system, str(start.path)

    def begin() -> Any:
        model: Any = load_causal_lm(path, dtype=torch.float32)[0]
        base = phase_base(model.config, phase, factor=factor, adjusted=system.long_base)
        return with_rope_base(model, base, positions=positions)

    task = replace(work.task, new_student=begin)
    stage = task.train(f"long-{phase}", task.cross_entropy, steps=system.long_steps)
    player = stage.players
    assert isinstance(player, Player)
    player.optimizer = work.optimizer(work.lr)(player.trained[0].module)
    player.lr = linear(1.0, 0.1 if phase == len(system.long_windows) else 1.0)
    stage.best = None
    return stage


def held_out_rows(windows: WindowSplit, length: int) -> Tensor:
    """Held-out text as rows of another length, (N, T); windows follow one another in it."""
    stream = windows[:]["input_ids"].flatten()
    return stream[: len(stream) // length * length].view(-1, length)


def _losses_by_length(
    task: LanguageTask, models: Mapping[str, Artifact], lengths: list[int], context: Context
) -> Table:
    """The loss of held-out text read in rows of each length."""
    rows: list[dict[str, Any]] = []
    for name, artifact in models.items():
        model: Any = task.load(artifact)
        row: dict[str, Any] = {"name": name, "base": rope_base(model.config)[0]}
        for length in lengths:
            ids = held_out_rows(task.windows.validation, length)
            if len(ids):
                each = max(1, 8 * lengths[0] // length)
                batches = _in_batches(task, ids, each)
                row[str(length)] = compare_causal_lms({"model": model}, batches, vocab_size=task.vocab_size)[
                    "model"
                ].loss
                context.results[f"{name}/loss at {length}"] = row[str(length)]
        rows.append(row)
    columns = [
        Column("base", "RoPE base", ",.0f"),
        *(Column(str(n), f"{n:,} tokens", ".4f", "lower", "nats per token, in rows of this length") for n in lengths),
    ]
    return Table("Longer contexts", columns, rows, ["Held-out text, its documents one after the other."])


def _in_batches(task: LanguageTask, ids: Tensor, each: int) -> Iterator[dict[str, Tensor]]:
    for part in ids.split(each):
        yield task.run.fabric.to_device({"input_ids": part})
