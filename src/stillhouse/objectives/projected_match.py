"""Matching a wider encoder: its hidden states are seen along fixed directions of the student's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed
from stillhouse.models.encoder_layers import EncoderLayers, layer_map
from stillhouse.objectives.encoders import LatentMatch


class ProjectedMatch(LatentMatch):
    """`LatentMatch` with the teacher's hidden states times a matrix (D, d) of each layer, which does not learn.

    (BiStil, Ansell et al., 2023, arXiv 2306.01709.) Attention compares as it does there: there are as many heads.

    Args:
        directions: for the teacher's embeddings and each of its layers.
        options: see `LatentMatch`.
    """

    def __init__(self, student: Observed, teacher: Observed, directions: Sequence[Tensor], **options: Any) -> None:
        super().__init__(student, teacher, project=True, **options)
        self.projection = nn.Identity()
        own, given = (len(EncoderLayers.of(model.module).layers) for model in (student, teacher))
        for place, layer in enumerate([0, *layer_map(own, given)]):
            self.register_buffer(f"directions_{place}", directions[layer])

    def compute(self, *, batch: Batch, **inputs: Any) -> Tensor:
        seen = {
            f"teacher_hidden_{m}": inputs[f"teacher_hidden_{m}"] @ self.get_buffer(f"directions_{m}")
            for m in range(self.count + 1)
        }
        return super().compute(batch=batch, **{**inputs, **seen})
