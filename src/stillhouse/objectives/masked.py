"""Terms of masked image modelling."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from stillhouse.core.objective import Term
from stillhouse.core.observed import Observed, Signal
from stillhouse.losses.directions import feature_distance


class Reconstruction(Term):
    """The loss that a masked autoencoder of ``transformers`` computes itself: the mean squared error of the pixels of
    masked patches (He et al., 2022, arXiv 2111.06377). The batch brings ``pixel_values`` and ``noise`` (B, L), by
    whose order patches are kept.
    """

    def __init__(self, model: Observed, *, name: str | None = None) -> None:
        super().__init__(name=name, loss=model.output("loss"))

    def compute(self, *, loss: Tensor, **_: Any) -> Tensor:
        return loss


class FeatureAlignment(Term):
    """Distance between projected student features (B, T, D) and teacher features (B, T, E): see `feature_distance`.

    With a projection directions are compared; without, the features themselves (D = E), as in DMAE's released code.
    """

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        *,
        projection: nn.Module | None,
        power: Literal[1, 2] = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())
        self.projection = projection
        self.power = power

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        projected = student if self.projection is None else self.projection(student)
        if projected.shape != teacher.shape:
            raise ValueError(
                f"{self.name}: student features {tuple(projected.shape)} and teacher features {tuple(teacher.shape)} "
                "differ; use a projection, and the same mask"
            )
        return feature_distance(projected, teacher, power=self.power, directions=self.projection is not None)


Projector = Literal["linear", "mlp-1", "mlp-2", "none"]


def projector(kind: Projector, inputs: int, outputs: int) -> nn.Module | None:
    """A linear map, one or two MLPs of one hidden layer as wide as ``outputs``, or None."""

    def mlp(width: int) -> list[nn.Module]:
        return [nn.Linear(width, outputs), nn.GELU(), nn.Linear(outputs, outputs)]

    if kind == "none":
        return None
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    return nn.Sequential(*mlp(inputs), *(mlp(outputs) if kind == "mlp-2" else []))
