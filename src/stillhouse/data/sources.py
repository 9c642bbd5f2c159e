"""Sources of batches: resumable streams over data sets and random generators; see `stillhouse.core.source`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Batches:
    """Shuffled batches of a map-style data set, forever; the order depends on the seed and the epoch only.

    With ``shuffle=False`` the order is the data's, and a pass goes on where the last one stopped, so that what is left
    out of one is read in the next.

    Args:
        data: anything with ``len`` and ``[]``. If it takes a list of indices (as `datasets.Dataset` and tensors do),
            pass ``gather=True`` and a batch is one look-up.
        batch_size: of the whole job; with several processes each gets its share of every batch.
        collate: list of items (or the gathered item) to batch; by default PyTorch's.
        shard: ``(rank, world)``; set by the engine.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        gather: bool = False,
        collate: Callable[[Any], Any] | None = None,
    ) -> None:
        if len(data) == 0:
            raise ValueError("the data set is empty")
        self.data = data
        self.batch_size = min(batch_size, len(data))
        self.seed = seed
        self.shuffle = shuffle
        self.gather = gather
        self.collate = collate or (_same if gather else torch.utils.data.default_collate)
        self.shard = (0, 1)
        self.epoch = 0
        self._position = 0
        self._order: torch.Tensor | None = None

    def __len__(self) -> int:
        """Whole batches in one pass; the rest of a pass is left out."""
        return batches_in(len(self.data), self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._position >= len(self):
            self.epoch, self._position, self._order = self.epoch + 1, 0, None
        if self._order is None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            n = len(self.data)
            if self.shuffle:
                self._order = torch.randperm(n, generator=generator)
            else:
                self._order = torch.arange(n).roll(-self.epoch * len(self) * self.batch_size)
        start = self._position * self.batch_size
        rank, world = self.shard
        if self.batch_size % world:
            raise ValueError(f"batch size {self.batch_size} does not divide among {world} processes")
        picked: Sequence[int] = self._order[start + rank : start + self.batch_size : world].tolist()
        self._position += 1
        return self.collate(self.data[picked] if self.gather else [self.data[i] for i in picked])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._position, self._order = state["epoch"], state["position"], None


def steps_in(passes: float, items: int, *, batch_size: int, accumulate: int) -> int:
    """Optimizer steps in which `Batches` of so many items are read ``passes`` times."""
    return max(1, round(passes * batches_in(items, batch_size) / accumulate))


def passes_in(steps: int, items: int, *, batch_size: int, accumulate: int) -> int:
    """Passes over the items, the last one perhaps not whole, in so many optimizer steps."""
    return -(-steps * accumulate // batches_in(items, batch_size))


def batches_in(items: int, batch_size: int) -> int:
    """Whole batches in one pass."""
    return items // min(items, batch_size)


class Drawn:
    """Batches made by ``draw(generator)``: noise, synthetic samples, anything random that needs no data."""

    def __init__(self, draw: Callable[[torch.Generator], Any], *, seed: int = 0) -> None:
        self.draw = draw
        self.epoch = 0
        self.shard = (0, 1)
        self._seed = seed
        self._drawn = 0

    def __next__(self) -> Any:
        rank, world = self.shard
        seed = (self._seed * 1_000_003 + self._drawn) * world + rank
        self._drawn += 1
        return self.draw(torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]


class Wrapped:
    """What draws from another source: its passes are that one's, and its share, also for what stands ``beside`` it."""

    def __init__(self, source: Any, *beside: Any) -> None:
        self.source = source
        self._shared = [one for one in (source, *beside) if hasattr(one, "shard")]

    @property
    def epoch(self) -> int:
        return self.source.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.source.epoch = value

    @property
    def shard(self) -> tuple[int, int]:
        return getattr(self.source, "shard", (0, 1))

    @shard.setter
    def shard(self, value: tuple[int, int]) -> None:
        for one in self._shared:
            one.shard = value


Change = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


class Augmented(Wrapped):
    """A source whose batches pass through ``change``; what is drawn depends on the seed and the batch's number only."""

    def __init__(self, source: Any, change: Change, *, seed: int = 0) -> None:
        super().__init__(source)
        self.change = change
        self.seed = seed
        self._drawn = 0

    def __next__(self) -> Any:
        rank, world = self.shard
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._drawn) * world + rank)
        self._drawn += 1
        return self.change(next(self.source), generator)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "source": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        self.source.load_state_dict(state["source"])


def _same(item: Any) -> Any:
    return item
