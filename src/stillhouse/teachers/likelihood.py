"""A model behind an endpoint that says how likely a text is. Shapes: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillhouse.teachers.client import side_by_side, streamed
from stillhouse.teachers.scorer import EndpointScorer


class EndpointLikelihood(EndpointScorer):
    """Asks an endpoint for the log-probability of every token of a row, and keeps nothing else."""

    def token_log_p(self, input_ids_BT: Tensor) -> Tensor:
        """log p of each token but the first: (B, T - 1), float64.

        Raises:
            ModelError: a row got no score, in one line.
        """
        rows = input_ids_BT.tolist()
        found: dict[int, list[float]] = {}
        todo = iter(enumerate(rows))

        async def worker(put: Callable[[Any], None]) -> None:
            for place, ids in todo:
                said = await self._row(ids)
                put((place, [one[token].logprob for token, one in zip(ids[1:], said, strict=True)]))
                self._client.answered += 1

        async def work(put: Callable[[Any], None]) -> None:
            async with self._client.open():
                await side_by_side(lambda: worker(put), min(self.concurrency, len(rows)))

        found.update(streamed(work))
        return torch.tensor([found[place] for place in range(len(rows))], dtype=torch.float64)
