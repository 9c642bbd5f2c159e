"""Batches made of rows from several sources in fixed shares. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.alternating import Several


class Mixed(Several):
    """Every batch holds the rows of one batch of each part, below each other.

    Rows without a mask that others have count whole; shorter rows are filled up at the right, where no mask is set.
    ``epoch`` is the first part's.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__(list(parts))

    @property
    def epoch(self) -> int:
        return self.sources[0].epoch

    def __next__(self) -> dict[str, Tensor]:
        return stacked([next(part) for part in self.sources])

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.sources, state["parts"], strict=True):
            part.load_state_dict(saved)


def stacked(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batches with ``input_ids`` (B, T), and perhaps masks of that shape, as one."""
    names = dict.fromkeys(name for batch in batches for name in batch)
    if len(names) > 1:
        batches = [{name: batch.get(name, torch.ones_like(batch["input_ids"])) for name in names} for batch in batches]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = [(0, longest - batch["input_ids"].shape[1]) for batch in batches]
    return {
        name: torch.cat([torch.nn.functional.pad(b[name], ends) for b, ends in zip(batches, fill, strict=True)])
        for name in names
    }


def all_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of conversations to be read as text: every token that is not padding is predicted."""
    if "attention_mask" not in batch:
        return dict(batch)
    return {**batch, "loss_mask": batch["attention_mask"]}
