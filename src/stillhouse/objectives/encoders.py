"""Terms that match BERT-like encoders layer by layer: hidden states, attention, soft targets.

Shapes: B sequences, T tokens, D width of the student, E of the teacher, V classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.losses.attention_scores import (
    attention_probabilities,
    attention_scores,
    masked_mse,
    pair_mask,
    zeroed_mse,
)
from stillhouse.models.encoder_layers import EncoderLayers, layer_map

AttentionForm = Literal["scores", "probabilities"]


def layer_signals(model: Observed, layers: list[int], side: str) -> dict[str, Signal]:
    """Hidden states (0: the embeddings), queries and keys of these layers, counted from 1, under names of their own."""
    found = EncoderLayers.of(model.module)
    signals = {f"{side}_hidden_0": model.tap(found.embeddings)}
    for place, layer in enumerate(layers, 1):
        signals[f"{side}_hidden_{place}"] = model.tap(found.layers[layer - 1])
        signals[f"{side}_query_{place}"] = model.tap(found.queries[layer - 1])
        signals[f"{side}_key_{place}"] = model.tap(found.keys[layer - 1])
    return signals


class LatentMatch(Term):
    """Hidden states and attention of student layer m against those of teacher layer m * (L_T / L_S), summed over m.

    (TinyBERT, Jiao et al., 2020, arXiv 1909.10351; the latent loss of ERNIE-Tiny.) The embeddings are matched too. One
    linear map, shared by all layers and trained with the player, brings hidden states to the teacher's width.

    Args:
        student, teacher: encoders, or models with one in them; with as many heads.
        project: whether there is a map; without, the widths must agree.
        attention: compare unnormalised scores, or probabilities.
        padding: ``"zeroed"``: both sides are 0 there and it counts in the mean; ``"left out"``: it does not.
        average: the mean over layers instead of the sum, of hidden states and of attention each.

    Raises:
        ModelError: heads or widths do not fit, or a model is not built like BERT.
    """

    def __init__(
        self,
        student: Observed,
        teacher: Observed,
        *,
        project: bool = True,
        attention: AttentionForm = "scores",
        padding: Literal["zeroed", "left out"] = "zeroed",
        average: bool = False,
        name: str | None = None,
    ) -> None:
        own, given = EncoderLayers.of(student.module), EncoderLayers.of(teacher.module)
        narrow, wide = (_width(model) for model in (student, teacher))
        if own.heads != given.heads:
            raise ModelError(f"the student has {own.heads} heads, the teacher {given.heads}; give both as many")
        if not project and narrow != wide:
            raise ModelError(f"student width {narrow}, teacher width {wide}: they must agree here")
        mapped = layer_map(len(own.layers), len(given.layers))
        count = len(mapped)
        super().__init__(
            name=name,
            **layer_signals(student, list(range(1, count + 1)), "student"),
            **{key: signal.detach() for key, signal in layer_signals(teacher, mapped, "teacher").items()},
        )
        self.count, self.heads, self.attention, self.average = count, own.heads, attention, average
        self.mse = zeroed_mse if padding == "zeroed" else masked_mse
        self.projection = nn.Linear(narrow, wide, bias=False) if project else nn.Identity()

    def compute(self, *, batch: Batch, **inputs: Any) -> Tensor:
        mask = batch.get("attention_mask")
        tokens, pairs = (None, None) if mask is None else (mask[..., None], pair_mask(mask))
        hidden, attended = [], []
        for m in range(self.count + 1):
            student, teacher = self.projection(inputs[f"student_hidden_{m}"]), inputs[f"teacher_hidden_{m}"]
            hidden.append(self.mse(student, teacher, tokens))
            if m:
                own, theirs = (self._attention(inputs, side, m, mask) for side in ("student", "teacher"))
                attended.append(self.mse(own, theirs, pairs))
        parts = {"hidden": torch.stack(hidden), "attention": torch.stack(attended)}
        total = torch.zeros((), device=hidden[0].device)
        for key, values in parts.items():
            reduced = values.mean() if self.average else values.sum()
            self.log(key, reduced)
            total = total + reduced
        return total

    def _attention(self, inputs: dict[str, Any], side: str, layer: int, mask: Tensor | None) -> Tensor:
        scores = attention_scores(inputs[f"{side}_query_{layer}"], inputs[f"{side}_key_{layer}"], heads=self.heads)
        return scores if self.attention == "scores" else attention_probabilities(scores, mask)


def _width(model: Observed) -> int:
    config: Any = model.module.config
    return int(config.hidden_size)


class SoftTargets(Term):
    """Cross-entropy of the student's softened classes against the teacher's: - sum_c p_T(c) log p_S(c), batch mean.

    Args:
        temperature: what the logits of both are divided by.
        rescale: multiply by its square, so that gradients keep their size (Hinton et al., 2015).
    """

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        *,
        temperature: float = 1.0,
        rescale: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())
        self.temperature = temperature
        self.factor = temperature**2 if rescale else 1.0

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        log_q = (student.float() / self.temperature).log_softmax(-1)
        p = (teacher.float() / self.temperature).softmax(-1)
        return self.factor * -(p * log_q).sum(-1).mean()
