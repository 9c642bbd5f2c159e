"""Distillation of a SwiftKV model from the original that it carries. Shapes: B sequences, T tokens."""

from __future__ import annotations

from typing import Any

from stillhouse.base.errors import ConfigError
from stillhouse.core.objective import Objective, TermValue
from stillhouse.core.observed import Observed, Signal, View
from stillhouse.losses.divergences import ForwardKL
from stillhouse.models.conversion import attention_paths
from stillhouse.models.swiftkv import original
from stillhouse.objectives.features import FeatureMSE
from stillhouse.objectives.language import TokenMatch, head_of, predicted


class OverAllPositions(TokenMatch):
    """A `TokenMatch` that divides by the number of positions, masked ones included: these count as zeros."""

    def compute(self, **inputs: Any) -> list[TermValue]:
        values = super().compute(**inputs)
        _, weight_BT = predicted(inputs["batch"])
        share = weight_BT.float().mean()
        for value in values:
            value.value = value.value * share
            value.carrier = None if value.carrier is None else value.carrier * share
        return values


def knowledge_preserved(
    student: Observed, *, temperature: float, hidden_weight: float, hidden_layer: int, vocab_size: int | None = None
) -> Objective:
    """T^2 KL(original_T || SwiftKV_T) over all positions, plus the mean squared error of one hidden state.

    Both models are one (`stillhouse.models.swiftkv`): the original runs with the switch off, without gradient.

    Args:
        hidden_layer: which of [x_0, ..., x_{L-1}, output of the last norm], counted from the end: -2 is the input of
            the last layer.
        vocab_size: the real vocabulary, where the model pads its own.
    """
    teacher = student.view("original", around=original)
    logits = OverAllPositions(
        head_of(student), head_of(teacher), ForwardKL(temperature=temperature), vocab_size=vocab_size, name="LogitKL"
    )
    hidden = FeatureMSE(_hidden(student, hidden_layer), _hidden(teacher, hidden_layer), name="HiddenMSE")
    return 1.0 * logits + hidden_weight * hidden


def _hidden(model: Observed | View, layer: int) -> Signal:
    module = model.observed.module if isinstance(model, View) else model.module
    layers = [path.rpartition(".")[0] for path in attention_paths(module)]
    if not -len(layers) - 1 <= layer <= -1:
        raise ConfigError(f"hidden_layer={layer}: must be from -1 (the output) to {-len(layers) - 1} (the embeddings)")
    return head_of(model).hidden if layer == -1 else model.tap(layers[layer + 1], of="input")
