"""Terms on features: hidden states of student and teacher, projected where their widths differ."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from stillhouse.core.objective import Term
from stillhouse.core.observed import Signal


class _LinearTo(nn.LazyLinear):
    """A linear map whose two widths are those of the first features it sees."""

    def __init__(self) -> None:
        super().__init__(1, bias=False)


class FeatureMSE(Term):
    """Mean squared error between features (FitNets, Romero et al., 2015, arXiv 1412.6550).

    Args:
        project: how the student's features (..., D) are brought to the teacher's width (..., E): ``"linear"`` (a
            linear map without bias, trained with the player), a module of your own, or None where widths agree.

    Raises ``ValueError`` if the widths differ and there is no projection.
    """

    def __init__(
        self,
        student: Signal,
        teacher: Signal,
        *,
        project: Literal["linear"] | nn.Module | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())
        self.projection = _LinearTo() if project == "linear" else project

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        if isinstance(self.projection, _LinearTo):  # until its first forward; then it is a plain Linear
            self.projection.out_features = teacher.shape[-1]
        projected = student if self.projection is None else self.projection(student)
        if projected.shape != teacher.shape:
            raise ValueError(
                f"{self.name}: student features {tuple(projected.shape)} and teacher features {tuple(teacher.shape)} "
                "differ; pass project='linear' or a module"
            )
        return (projected - teacher).float().square().mean()
