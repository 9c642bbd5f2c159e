"""Sources: resumable streams of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from stillhouse.base.files import random_state, restore_random_state


@runtime_checkable
class Source(Protocol):
    """A stream that never ends and can be put back to where it stood.

    ``epoch`` counts passes over the data (0 for streams that have none).
    """

    epoch: int

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Repeat:
    """Any iterable (a torch ``DataLoader``, a list of batches) as an endless source.

    After a resume, a pass begins with the random state it had begun with (a ``DataLoader`` shuffles by it) and is run
    forward to where it stood; it must then yield the same batches again.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.epoch = 0
        self._taken = 0
        self._random: dict[str, Any] | None = None  # at the beginning of the pass
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is not None:
            for batch in self._iterator:
                self._taken += 1
                return batch
            self.epoch += 1
        self._random = random_state()
        self._iterator, self._taken = iter(self.batches), 1
        for batch in self._iterator:
            return batch
        raise ValueError("the data loader yields no batch; what yields batches only once cannot be read again")

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self._taken, "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._taken, self._random = state["epoch"], state["taken"], state["random"]
        self._iterator = None
        if self._random is not None:
            now = random_state()
            restore_random_state(self._random)
            self._iterator = iter(self.batches)
            for _ in range(self._taken):
                next(self._iterator)
            restore_random_state(now)


def as_source(data: Any) -> Source:
    """A `Source` from what a user passes: a source, or any iterable of batches."""
    if isinstance(data, Source):
        return data
    if isinstance(data, Iterable):
        return Repeat(data)
    raise TypeError(f"a source must yield batches; {type(data).__name__} does not")
