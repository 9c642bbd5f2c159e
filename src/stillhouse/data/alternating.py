"""Several sources in turn: one batch of each, over and over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class Several:
    """What streams made of several sources have in common: the passes of the slowest, one share for all."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = sources

    @property
    def epoch(self) -> int:
        return min(source.epoch for source in self.sources)

    @property
    def shard(self) -> tuple[int, int]:
        return getattr(self.sources[0], "shard", (0, 1))

    @shard.setter
    def shard(self, value: tuple[int, int]) -> None:
        for source in self.sources:
            if hasattr(source, "shard"):
                source.shard = value


class Alternating(Several):
    """Batches of several sources in turn; ``batch[key]`` (B,) says which source a batch is from."""

    def __init__(self, sources: Sequence[Any], *, key: str = "language") -> None:
        super().__init__(sources)
        self.key = key
        self._turn = 0

    def __next__(self) -> Mapping[str, Any]:
        number = self._turn % len(self.sources)
        self._turn += 1
        batch = next(self.sources[number])
        return {**batch, self.key: torch.full((len(batch["input_ids"]),), number)}

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self._turn, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._turn = state["turn"]
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
