"""Masked tokens: what BERT-like encoders are trained to fill in. Suffixes: ``_BT`` sequences by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.sources import Augmented

IGNORED = -100
"""The label of a token that is not to be predicted."""


def mask_tokens(
    ids_BT: Tensor, *, mask_id: int, vocab_size: int, special: Sequence[int], rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masked ids and labels (Devlin et al., 2019, arXiv 1810.04805).

    Of all tokens that are not ``special``, a share ``rate`` is to be predicted: 80 % of these become the mask, 10 % a
    random token, 10 % stay. Labels are `IGNORED` elsewhere.
    """
    lots_BT, kind_BT = (torch.rand(ids_BT.shape, generator=generator) for _ in range(2))
    other_BT = torch.randint(vocab_size, ids_BT.shape, generator=generator)
    picked_BT = (lots_BT < rate) & ~torch.isin(ids_BT, torch.tensor(list(special), dtype=ids_BT.dtype))
    labels_BT = ids_BT.masked_fill(~picked_BT, IGNORED)
    masked_BT = ids_BT.masked_fill(picked_BT & (kind_BT < 0.8), mask_id)
    swapped_BT = picked_BT & (kind_BT >= 0.8) & (kind_BT < 0.9)
    return torch.where(swapped_BT, other_BT, masked_BT), labels_BT


class Masked(Augmented):
    """The batches of another source with tokens masked anew each time; resumable like it.

    Args:
        source: yields mappings with ``input_ids``; ``labels`` are added.
        mask_id, vocab_size, special, rate: see `mask_tokens`.
    """

    def __init__(
        self, source: Any, *, mask_id: int, vocab_size: int, special: Sequence[int], rate: float = 0.15, seed: int = 0
    ) -> None:
        def change(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
            options: dict[str, Any] = {"mask_id": mask_id, "vocab_size": vocab_size, "special": special, "rate": rate}
            ids, labels = mask_tokens(batch["input_ids"], generator=generator, **options)
            return {**batch, "input_ids": ids, "labels": labels}

        super().__init__(source, change, seed=seed)
