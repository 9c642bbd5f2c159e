"""Objectives: what a player minimises. Terms read signals; weights and schedules combine them.

``1.0 * A + linear(0.0, 0.9) * B`` is an objective again. Calling ``objective(batch, progress)`` gives the scalar to
minimise; `Objective.evaluate` gives every term's value and weight as well, which is what gets logged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed, Signal, Turn, as_batch, with_feeds
from stillhouse.core.schedule import AdaptiveSchedule, Constant, Progress, Scheduled, resolve


@dataclass
class TermValue:
    """One term at one step: its value, its weight, and scalars worth logging beside it.

    Terms that one pass computes together (a divergence and a cross-entropy from the same chunks) have their sum in
    the ``carrier`` of the first; the others carry zero.
    """

    name: str
    value: Tensor
    weight: float = 1.0
    extras: dict[str, float | Tensor] = field(default_factory=dict)
    carrier: Tensor | None = None
    outer: float = 1.0  # product of the weights applied after the carrier was computed

    @property
    def weighted(self) -> Tensor:
        factor, tensor = (self.weight, self.value) if self.carrier is None else (self.outer, self.carrier)
        return tensor if factor == 1.0 else factor * tensor


class Objective(nn.Module):
    """Base of everything a player can minimise; see `Term` for writing one."""

    name: str

    def signals(self) -> Iterator[Signal]:
        """All signals this objective reads."""
        raise NotImplementedError

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        """The value and weight of each term on ``batch``."""
        raise NotImplementedError

    def forward(self, batch: Any, progress: Progress | float = 0.0) -> Tensor:
        """The scalar to minimise. ``progress``: a `Progress`, or the done share of the run as a float."""
        turn = Turn(self.signals())
        values = self.evaluate(turn, as_batch(batch), Progress.of(progress))
        return total(values)

    def named(self, name: str) -> Objective:
        """The same objective under another name in logs."""
        self.name = name
        return self

    def observed(self) -> list[Observed]:
        """The models this objective listens to, each once."""
        return list(dict.fromkeys(signal.observed for signal in with_feeds(self.signals())))

    def __add__(self, other: Objective) -> Objective:
        return Sum([*_parts(self), *_parts(other)]) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, weight: Scheduled) -> Objective:
        return Weighted(self, weight) if isinstance(weight, int | Scheduled) else NotImplemented

    __rmul__ = __mul__


def total(values: Sequence[TermValue]) -> Tensor:
    """Sum of weighted term values."""
    first, *rest = values
    result = first.weighted
    for value in rest:
        result = result + value.weighted
    return result


def _parts(objective: Objective) -> list[Objective]:
    return list(objective.terms) if isinstance(objective, Sum) else [objective]  # type: ignore[arg-type]


class Sum(Objective):
    """Several objectives added up; terms of the same name are told apart by a number."""

    def __init__(self, terms: Sequence[Objective]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.name = " + ".join(term.name for term in terms)

    def signals(self) -> Iterator[Signal]:
        for term in self.terms:
            yield from term.signals()  # type: ignore[operator]

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        values: list[TermValue] = []
        taken: set[str] = set()
        for term in self.terms:
            for value in term.evaluate(turn, batch, progress):  # type: ignore[operator]
                numbered = (f"{value.name}_{number}" for number in itertools.count(2))
                value.name = next(name for name in itertools.chain([value.name], numbered) if name not in taken)
                taken.add(value.name)
                values.append(value)
        return values


class Weighted(Objective):
    """An objective times a number or a schedule."""

    def __init__(self, inner: Objective, weight: Scheduled) -> None:
        super().__init__()
        self.inner = inner
        self.weight = weight
        self.name = inner.name

    def named(self, name: str) -> Objective:
        self.name = name
        self.inner.named(name)
        return self

    def signals(self) -> Iterator[Signal]:
        return self.inner.signals()

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        weight = resolve(self.weight, progress)
        values = self.inner.evaluate(turn, batch, progress)
        for value in values:
            if isinstance(self.weight, AdaptiveSchedule):
                self.weight.record(value.value, progress)
            value.weight *= weight
            value.outer *= weight
        return values


class Term(Objective):
    """One loss bound to the signals it reads.

    Subclasses pass their signals to ``super().__init__`` by name and write `compute`, which gets the tensors under
    the same names::

        class FeatureMSE(Term):
            def __init__(self, student: Signal, teacher: Signal) -> None:
                super().__init__(student=student, teacher=teacher.detach())

            def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
                return (student - teacher).square().mean()

    ``compute`` also gets ``batch`` and ``progress``. Numbers that may follow a schedule are stored as they are and read
    with ``self.at(self.temperature, progress)``. Parameters of a term (a projection head) are trained with its player.
    """

    def __init__(self, *, name: str | None = None, **signals: Signal) -> None:
        super().__init__()
        self.name = name or type(self).__name__
        self._signals: Mapping[str, Signal] = signals
        self._extras: dict[str, float | Tensor] = {}

    def compute(self, *args: Any, **inputs: Any) -> Tensor | list[TermValue]:
        """The loss as a scalar (or several named ones), from the signals' tensors, ``batch`` and ``progress``."""
        raise NotImplementedError

    def at(self, value: Scheduled, progress: Progress) -> float:
        """The number a hyper-parameter has now; scheduled ones are logged."""
        number = resolve(value, progress)
        if not isinstance(value, int | float | Constant):
            label = next((key for key, held in {**self.__dict__, **self._modules}.items() if held is value), "")
            self.log(label or "value", number)
        return number

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a scalar beside this term's value; a tensor is read only when the step is logged."""
        self._extras[name] = value.detach() if isinstance(value, Tensor) else value

    def signals(self) -> Iterator[Signal]:
        return iter(self._signals.values())

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        self._extras = {}
        inputs = {name: turn.read(signal, batch) for name, signal in self._signals.items()}
        computed = self.compute(**inputs, batch=batch, progress=progress)
        values = [TermValue(self.name, computed)] if isinstance(computed, Tensor) else computed
        values[0].extras |= self._extras
        for schedule in self.children():
            if isinstance(schedule, AdaptiveSchedule):
                schedule.record(values[0].value, progress)
        return values


def gradient_shares(values: Sequence[TermValue], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """Each term's share of the summed gradient norms over ``parameters``; keeps the graph for the backward.

    Empty if one pass computed several terms: their gradients exist only as a sum.
    """
    if any(value.carrier is not None for value in values):
        return {}
    norms: dict[str, float] = {}
    for value in values:
        if not value.weighted.requires_grad:
            norms[value.name] = 0.0
            continue
        gradients = torch.autograd.grad(value.weighted, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms[value.name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    whole = sum(norms.values())
    return {name: norm / whole if whole else 0.0 for name, norm in norms.items()}
