"""Long documents as rows of their own, and batches of long and short rows in fixed shares of their tokens.

Suffixes: N windows, T tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.errors import DataError
from stillhouse.data.alternating import Several


def documents_of(stream_NT: Tensor, *, end: int) -> list[Tensor]:
    """The documents of a stream that was cut into windows, each with its ``end`` token; the last may have none."""
    stream = stream_NT.flatten()
    ends = (stream == end).nonzero().flatten() + 1
    return [document for document in torch.tensor_split(stream, ends.tolist()) if len(document)]


def rows_between(documents: Sequence[Tensor], lower: int, upper: int) -> list[Tensor]:
    """Pieces of documents with more than ``lower`` and at most ``upper`` tokens; longer documents give several.

    Raises:
        DataError: there is none.
    """
    rows = [piece for one in documents for piece in one.split(upper) if len(piece) > lower]
    if not rows:
        longest = max((len(one) for one in documents), default=0)
        raise DataError(
            f"no document has more than {lower} tokens (the longest: {longest}); give text with longer ones, or "
            "shorter windows"
        )
    return rows


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of several lengths as a batch: ``input_ids``, ``attention_mask`` and ``loss_mask`` (B, T)."""
    ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "loss_mask": mask}


class TokenShares(Several):
    """Batches of two sources such that ``share`` of all tokens so far are the first one's, as nearly as can be.

    The next batch is the first source's while that has less than its share; so the tokens of one batch are the most
    by which it is ever off. Padding does not count.
    """

    def __init__(self, first: Any, second: Any, share: float) -> None:
        super().__init__((first, second))
        self.share = share
        self.tokens = [0, 0]

    def __next__(self) -> Any:
        number = 0 if self.tokens[0] < self.share * sum(self.tokens) else 1
        batch = next(self.sources[number])
        self.tokens[number] += (
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        )
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": list(self.tokens), "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = list(state["tokens"])
        for source, own in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(own)
