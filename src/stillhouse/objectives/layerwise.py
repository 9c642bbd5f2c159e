"""Terms that match layer by layer, where each student layer reads the teacher's own input to that layer.

Shapes: B sequences, T tokens, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.losses.matrices import frobenius_distance, token_distance
from stillhouse.models.conversion import LayerByLayer, attention_paths

Distance = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Layerwise(Term):
    """The sum over layers of a distance between a student's signal and a teacher's; each layer's own is logged.

    Args:
        student, teacher: signals by layer, for the same layers.
        distance: ``distance(student, teacher, mask)``, the mask being the batch's ``attention_mask`` or None.
    """

    def __init__(
        self, student: Mapping[int, Signal], teacher: Mapping[int, Signal], distance: Distance, *, name: str
    ) -> None:
        signals = {f"student_{layer}": signal for layer, signal in student.items()}
        super().__init__(name=name, **signals, **{f"teacher_{layer}": teacher[layer].detach() for layer in student})
        self.layers = list(student)
        self.distance = distance

    def compute(self, *, batch: Batch, **inputs: Any) -> Tensor:
        mask = _mask(batch, inputs[f"student_{self.layers[0]}"].shape[-2])
        values = [self.distance(inputs[f"student_{n}"], inputs[f"teacher_{n}"], mask) for n in self.layers]
        for layer, value in zip(self.layers, values, strict=True):
            self.log(f"layer_{layer}", value)
        return sum(values[1:], values[0])


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let a ``transformers`` model compute its attention so that the maps exist; put it back afterwards."""
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def observe_layers(
    model: Any,
    layers: Sequence[int],
    teacher: Observed,
    *,
    give: Literal["matrix", "mixer", "block"],
    window: int | None = None,
) -> tuple[Observed, dict[int, Signal], dict[int, Signal]]:
    """A converted model on the inputs of the teacher's layers: its observer, its signals and the teacher's, by layer.

    Args:
        model: the converted model, which is trained.
        layers: those compared.
        teacher: the model it came from.
        give: what is compared: the mixing matrices with the teacher's attention maps, the outputs of mixer and
            attention, or those of the whole layer.
        window: read only so many tokens of each sequence: maps take memory quadratic in that.
    """
    paths = attention_paths(teacher.module)
    around: Callable[[nn.Module], AbstractContextManager[None]] | None = eager_attention if give == "matrix" else None
    view = teacher.view(give, partial(_begin, window), around=around)
    places = {n: paths[n].rpartition(".")[0] if give == "block" else paths[n] for n in layers}
    inputs = {str(n): view.tap(places[n], of="input") for n in layers}
    targets = {n: view.tap(places[n], index=1 if give == "matrix" else 0) for n in layers}

    def call(run: Callable[..., Any], batch: Batch) -> Any:
        return run({n: batch[str(n)] for n in layers}, _mask(batch, batch[str(layers[0])].shape[1]))

    student = Observed(LayerByLayer(model, layers, give=give), name="student", call=call)
    forced = student.view("teacher's inputs", feed=inputs)
    return student, {n: forced.output(str(n)) for n in layers}, targets


def matrix_orientation(student: Mapping[int, Signal], teacher: Mapping[int, Signal]) -> Layerwise:
    """Stage 1 of MOHAWK (Bick et al., 2024): || A_l(u_l) - M_l(u_l) ||_F, u_l the teacher's input to layer l."""
    return Layerwise(student, teacher, _with_maps, name="MatrixOrientation")


def hidden_alignment(student: Mapping[int, Signal], teacher: Mapping[int, Signal]) -> Layerwise:
    """Stage 2 of MOHAWK (Bick et al., 2024): the L2 distance of the outputs on the teacher's input to the layer."""
    return Layerwise(student, teacher, token_distance, name="HiddenAlignment")


def _with_maps(student_BHTT: Tensor, teacher_BHTT: Tensor | None, mask_BT: Tensor | None) -> Tensor:
    if teacher_BHTT is None:
        raise ModelError("the teacher's attention gives no maps, even as eager attention; this kind cannot be matched")
    return frobenius_distance(student_BHTT, teacher_BHTT, mask_BT)


def _begin(window: int | None, batch: Batch) -> Batch:
    """The first tokens of each sequence."""
    return batch if window is None else {key: value[:, :window] for key, value in batch.items()}


def _mask(batch: Batch, length: int) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask[:, :length]
