"""Terms that pull equally hard: weights from the size of each term's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from stillhouse.core.objective import Objective, Sum, TermValue
from stillhouse.core.observed import Batch, Signal, Turn
from stillhouse.core.schedule import Progress

EPSILON = 1e-8


class GradientBalance(Objective):
    """The mean of several terms' gradients after each is brought to the same norm, in certain parameters.

    w_i = (1 / g_i) / sum_j (1 / g_j), where g_i is the norm of term i's gradient in ``parameters``, those of the last
    layer, say: the norm in all of them is taken to go with it. The sum over j keeps the size of the gradient about
    that of the terms themselves. (Approximate GradMag, as in Minixhofer et al., 2025, arXiv 2503.20083.)

    It costs a backward pass to these parameters for each term. A term that has no gradient there gets weight 0 in the
    mean of the others; in evaluation all weights are equal. Terms that are computed in one pass cannot be told apart.
    """

    def __init__(self, terms: Sequence[Objective], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.inner = Sum(terms)
        self.name = self.inner.name
        self._parameters_of = list(parameters)  # a plain list: they are the model's, not this objective's

    def signals(self) -> Iterator[Signal]:
        return self.inner.signals()

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        values = self.inner.evaluate(turn, batch, progress)
        for value, weight in zip(values, self._weights(values), strict=True):
            value.weight *= weight
            value.outer *= weight
        return values

    def _weights(self, values: Sequence[TermValue]) -> list[float]:
        if not torch.is_grad_enabled() or len(values) == 1:
            return [1 / len(values)] * len(values)
        wanted = [parameter for parameter in self._parameters_of if parameter.requires_grad]
        squares = []
        for value in values:
            square = torch.zeros((), device=value.value.device)
            if value.weighted.requires_grad:
                found = torch.autograd.grad(value.weighted, wanted, retain_graph=True, allow_unused=True)
                for gradient in found:
                    square = square if gradient is None else square + gradient.float().square().sum()
            squares.append(square)
        both = torch.stack(squares)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        norms = both.sqrt()
        inverse = torch.where(norms > 0, 1 / (norms + EPSILON), torch.zeros_like(norms))
        return (inverse / inverse.sum().clamp(min=EPSILON)).tolist()
