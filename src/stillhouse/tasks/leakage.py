"""Interfaces that leak logits: random prompts, what an attacker reads of a model, and which limits hold it back.

Shapes: N answers, V vocabulary, D width.
"""

from __future__ import annotations

import base64
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.source import Source
from stillhouse.core.stage import Context, Stage
from stillhouse.data.sources import Batches
from stillhouse.models.head_recovery import (
    Recovered,
    low_rank_completion,
    principal_cosines,
    recover_head,
    recover_head_in_parts,
    without_mean,
)
from stillhouse.tasks.language import LanguageTask
from stillhouse.tasks.language_cache import teacher_from_cache
from stillhouse.teachers.cache import Numbered
from stillhouse.teachers.logit_api import LogitAPI

WHOLE = 2**27  # logits that are decomposed as one matrix: a gigabyte
SKETCH = 4096  # buckets where the width is not known


def random_prompts(count: int, tokens: int, vocab_size: int, *, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, tokens), generator=generator).tolist()


def read_answers(file: Path) -> Iterator[Tensor]:
    """The answers that `LogitAPI.everything` gave, as a stage wrote them down: in parts (n, V), in order."""
    for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=["values"]):
        rows = [np.frombuffer(base64.b64decode(text), "<f8") for text in batch["values"].to_pylist()]
        yield torch.from_numpy(np.stack(rows))


def recover(file: Path, vocab_size: int, *, rank: int | None, sketch: int | None, seed: int) -> Recovered:
    """The output matrix behind written answers: whole, or through a sketch if one is wanted or they are too many."""
    count = pq.ParquetFile(file).metadata.num_rows
    if sketch is None and count * vocab_size <= WHOLE:
        return recover_head(torch.cat(list(read_answers(file))), rank=rank)
    buckets = sketch or min(vocab_size, 4 * rank if rank else SKETCH)
    return recover_head_in_parts(partial(read_answers, file), vocab_size, sketch=buckets, rank=rank, seed=seed)


def true_cosines(model: nn.Module, found_VR: Tensor, vocab_size: int) -> Tensor:
    """How the recovered column space lies to that of the model's own output matrix, as far as a softmax can tell."""
    own_VD = model.get_output_embeddings().weight[:vocab_size].detach().cpu()  # type: ignore[operator]
    return principal_cosines(without_mean(found_VR.double()), without_mean(own_VD.double()))


@dataclass(frozen=True)
class Kept:
    """What a limited interface showed of the training text, kept by sample id."""

    teacher: Observed

    def numbered(self, source: Source) -> Batches:
        """The same batches, with the ids the kept answers go by."""
        assert isinstance(source, Batches)
        return Batches(Numbered(source.data), source.batch_size, seed=source.seed, gather=True)


def read_leak(task: LanguageTask, top_k: int | None) -> Generator[Stage, Artifact, Kept | None]:
    """What the interface shows of the training text, written down once where it shows ``top_k`` entries only."""
    if top_k is None or top_k >= task.vocab_size:
        return None
    return Kept((yield from teacher_from_cache(task, k=top_k)))


class _Answered(nn.Module):
    """A model's next-token logits of known prompts, worked out once: many interfaces to it are asked the same."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells callers where inputs belong
        self.numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
        device, found = next(model.parameters()).device, []
        with torch.no_grad():
            for start in range(0, len(prompts), 32):
                ids = torch.tensor(list(prompts[start : start + 32]), device=device)
                found.append(model(input_ids=ids).logits[:, -1, :vocab_size].float().cpu())
        self.logits_NV = torch.cat(found)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        rows = [self.numbers[tuple(prompt)] for prompt in input_ids.tolist()]
        return SimpleNamespace(logits=self.logits_NV[rows][:, None])


def defences(task: LanguageTask, context: Context, *, top_k: int, prompts: list[list[int]]) -> Table:
    """How much of the output matrix is recovered as an interface shows less: the auditor's table.

    Interfaces without bias are attacked by low-rank completion at the true width, which helps the attacker.
    """
    victim = _Answered(task.teacher, prompts, task.vocab_size)
    own = task.teacher.get_output_embeddings().weight
    width = own.shape[1]
    half = max(2, top_k // 2)
    settings: dict[str, dict[str, Any]] = {
        "all logits": {"shows": "logits"},
        "all log-probabilities": {},
        "rounded to 3 decimals": {"decimals": 3},
        "rounded to 1 decimal": {"decimals": 1},
        "whole numbers": {"decimals": 0},
        f"top {top_k}, with bias": {"top_k": top_k},
        f"top {half}, with bias": {"top_k": half},
        f"top {half}, with bias, 1 decimal": {"top_k": half, "decimals": 1},
        f"top {top_k}, no bias": {"top_k": top_k, "allows_bias": False},
        f"top {half}, no bias": {"top_k": half, "allows_bias": False},
    }
    rows: list[dict[str, Any]] = []
    for name, options in settings.items():
        api = LogitAPI(victim, task.vocab_size, **options)
        found = _attack(api, prompts, width)
        cosines = true_cosines(task.teacher, found.weight, task.vocab_size)
        rank = float((cosines > 0.99).sum())
        rows.append({"name": name, "width": found.rank, "gap": found.gap, "calls": api.budget.calls, "rank": rank})
        rows[-1]["cosine"] = float(cosines.sum()) / width
    context.results = {f"{row['name']}/{key}": float(row[key]) for row in rows for key in ("width", "rank", "cosine")}
    note = f"{len(prompts):,} random prompts; the model is {width} wide and has {task.vocab_size:,} tokens."
    return Table("What limits hold back", COLUMNS, rows, [note])


def _attack(api: LogitAPI, prompts: list[list[int]], width: int) -> Recovered:
    if api.top_k >= api.vocab_size or api.allows_bias:
        return recover_head(torch.stack([api.everything(prompt) for prompt in prompts]))
    values, seen = (torch.stack(part) for part in zip(*(api.seen(prompt) for prompt in prompts), strict=True))
    return recover_head(low_rank_completion(values, seen, width, rounds=5), rank=width)


COLUMNS = [
    Column("width", "width found", ",d", None, "where the singular values drop furthest"),
    Column("rank", "directions found", ",.0f", None, "principal angles with a cosine above 0.99"),
    Column("cosine", "mean cosine", ".3f", None, "of all directions of the output matrix; missing ones count 0"),
    Column("gap", "drop", ".1e", None, "last singular value over the next"),
    Column("calls", "calls", ",d", None, "to the interface"),
]
