"""The smallest language model: logits after a token are a row of a table, so that everything can be counted out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Observed, View
from stillhouse.objectives.language import LanguageHead


class Table(nn.Module):
    """A language model whose logits after a token are a row of a table."""

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        V, dtype = len(logits_VV), logits_VV.dtype
        self.embed = nn.Embedding.from_pretrained(logits_VV.clone(), freeze=False)
        self.head = nn.Linear(V, V, bias=False, dtype=dtype)
        self.head.weight = nn.Parameter(torch.eye(V, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def head(model: Observed | View) -> LanguageHead:
    """Its output head."""
    return LanguageHead(model.tap("head", of="input"), model.parameter("head.weight"))
