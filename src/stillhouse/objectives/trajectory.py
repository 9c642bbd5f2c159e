"""Trajectories of training: recorded, followed by students on learnt data, and measured for how they err.

Shapes: P weights of a network in one row, E recorded points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from stillhouse.core.objective import Objective, Term, TermValue
from stillhouse.core.observed import Batch, Observed, Signal, Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.condensation.dsa import Kind, augment
from stillhouse.data.condensation.synthetic import SyntheticImages
from stillhouse.losses.sharpness import adaptive_perturbation, gsam_direction, inner

Weights = dict[str, Tensor]
Shown = Callable[[int, int], tuple[Tensor, Tensor]]
"""``(step, seed) -> (images, labels)``: what a student sees in one step."""


class FlatCrossEntropy(Term):
    """Cross-entropy whose gradient is a GSAM step's: two passes, one at the weights, one where the loss is worst.

    The value is the loss at the weights. Any optimizer takes the direction g_p - alpha g_v for a gradient, so that the
    step is that of gradient surrogate-gap minimisation in its adaptive form.

    Args:
        model: the network that is trained; its forward takes images and gives logits.
        rho: size of the perturbation; 0 leaves plain cross-entropy.
        alpha: share of the upright part that is taken off; 0 is adaptive SAM.
    """

    def __init__(self, model: Observed, *, rho: float = 0.01, alpha: float = 0.4, name: str | None = None) -> None:
        super().__init__(name=name, student=model.output())
        self._model = (model.module,)  # not a part of this module: its weights are the player's
        self.rho = rho
        self.alpha = alpha

    def compute(self, *, student: Tensor, batch: Batch, **_: Any) -> Tensor:
        loss = F.cross_entropy(student, batch["labels"])
        if not (self.rho and loss.requires_grad and torch.is_grad_enabled()):
            return loss
        (model,) = self._model
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        here = torch.autograd.grad(loss, list(weights.values()))
        step = adaptive_perturbation(list(weights.values()), here, rho=self.rho)
        moved = {
            name: (weight + e).detach().requires_grad_()
            for (name, weight), e in zip(weights.items(), step, strict=True)
        }
        worst = F.cross_entropy(functional_call(model, moved, (batch["pixel_values"],)), batch["labels"])
        there = torch.autograd.grad(worst, list(moved.values()))
        direction = gsam_direction(here, there, alpha=self.alpha)
        pulled = inner([d.detach() for d in direction], list(weights.values()))
        self.log("perturbed_loss", worst)
        return loss.detach() + pulled - pulled.detach()


class Recorded(Objective):
    """An objective that keeps the weights its model had every ``every`` steps, from the first step on.

    The record is a buffer, saved with the run. `finished` adds the weights after the last step.
    """

    points: Tensor

    def __init__(self, inner: Objective, model: nn.Module, *, every: int, count: int) -> None:
        super().__init__()
        self.inner = inner
        self.name = inner.name
        self.every = every
        self._model = (model,)
        size = sum(weight.numel() for weight in model.parameters())
        self.register_buffer("points", torch.zeros(count, size))

    def signals(self) -> Iterator[Signal]:
        return self.inner.signals()

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        place, between = divmod(progress.step, self.every)
        if self.training and not between and place < len(self.points):
            self.points[place] = parameters_to_vector(self._model[0].parameters()).detach()
        return self.inner.evaluate(turn, batch, progress)

    def finished(self, model: nn.Module) -> Tensor:
        """All points (E + 1, P), those of the trained ``model`` last."""
        last = parameters_to_vector(model.parameters()).detach()
        return torch.cat([self.points, last[None]]).cpu()


# -- following ------------------------------------------------------------------------------------------------------


def unflatten(model: nn.Module, flat: Tensor) -> Weights:
    """A row of weights (P,) as ``model``'s parameters by name."""
    named = list(model.named_parameters())
    pieces = flat.split([weight.numel() for _, weight in named])
    return {name: piece.view_as(weight) for (name, weight), piece in zip(named, pieces, strict=True)}


def flatten(weights: Mapping[str, Tensor]) -> Tensor:
    """Parameters by name as one row (P,)."""
    return torch.cat([weight.flatten() for weight in weights.values()])


def unroll(
    model: nn.Module, start: Tensor, shown: Shown, step_size: Tensor | float, *, steps: int, seed: int = 0
) -> Tensor:
    """Where ``steps`` steps of plain SGD lead from the weights ``start`` (P,); gradients flow through all of them."""

    def loss(weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)

    weights = unflatten(model, start)
    for number in range(steps):
        gradients = grad(loss)(weights, *shown(number, seed))
        weights = {name: weight - step_size * gradients[name] for name, weight in weights.items()}
    return flatten(weights)


def trajectory_matching_loss(reached: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """||reached - target||^2 / ||start - target||^2 (Cazenavette et al., 2022, arXiv 2203.11932, equation 2)."""
    return (reached - target).square().sum() / (start - target).square().sum()


def shown_from(pixels: Tensor, labels: Tensor, *, batch_size: int | None = None, kinds: Sequence[Kind] = ()) -> Shown:
    """Learnt images as a student sees them: all of them or a batch drawn by the seed, augmented alike."""

    def shown(step: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images, own = pixels, labels
        if batch_size is not None and batch_size < len(labels):
            chosen = torch.randperm(len(labels), generator=generator)[:batch_size].to(labels.device)
            images, own = pixels[chosen], labels[chosen]
        return augment(images, kinds, generator), own

    return shown


class TrajectoryMatching(Term):
    """How far students end from the expert whose weights they started with (MTT, FTD).

    The batch holds ``start`` and ``target`` (P,), weights of an expert some epochs apart, and ``seed``.

    Args:
        synthetic: the observed learnable images.
        model: the architecture that is unrolled; its own weights are not used.
        steps: of the student, through all of which gradients flow.
        batch_size: synthetic images in a step; None: all.
        kinds: augmentations the images pass through.
    """

    def __init__(
        self,
        synthetic: Observed,
        model: nn.Module,
        *,
        steps: int,
        batch_size: int | None = None,
        kinds: Sequence[Kind] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, pixels=synthetic.parameter("pixels"), step_size=synthetic.parameter("step_size"))
        data = synthetic.module
        assert isinstance(data, SyntheticImages)
        self._fixed = (model.requires_grad_(False).eval(), data)
        self.steps, self.batch_size, self.kinds = steps, batch_size, tuple(kinds)

    def compute(self, *, pixels: Tensor, step_size: Tensor, batch: Batch, **_: Any) -> Tensor:
        model, data = self._fixed
        shown = shown_from(pixels, data.labels, batch_size=self.batch_size, kinds=self.kinds)
        reached = unroll(model, batch["start"], shown, step_size, steps=self.steps, seed=int(batch["seed"]))
        self.log("step_size", step_size)
        return trajectory_matching_loss(reached, batch["start"], batch["target"])


# -- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accumulated_error(
    model: nn.Module, points: Tensor, shown: Shown, step_size: float, *, steps: int, epochs: int, last: int
) -> float:
    """||student - expert||/||start - expert|| where a student has gone all segments from the expert's first weights.

    Unlike in training, a segment starts where the student came to, so that its errors add up.

    Args:
        points: (E, P), the expert after every epoch.
        steps, epochs: of the student for so many of the expert: one segment.
        last: the epoch of the expert that the student is compared to.
    """
    student = points[0]
    for segment in range(last // epochs):
        student = unroll(model, student, shown, step_size, steps=steps, seed=segment)
    end = points[last // epochs * epochs]
    return float((student - end).norm() / (points[0] - end).norm())


@torch.no_grad()
def amplification(
    model: nn.Module, start: Tensor, shown: Shown, step_size: float, *, steps: int, size: float, draws: int, seed: int
) -> float:
    """How much farther apart two students end than they started: mean of ||F(w + e) - F(w)|| / ||e||.

    The e are random, of norm ``size`` ||w||.
    """
    end = unroll(model, start, shown, step_size, steps=steps)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(draws):
        e = torch.randn(start.shape, generator=generator)
        e = e * (size * start.norm() / e.norm())
        ratios.append(float((unroll(model, start + e, shown, step_size, steps=steps) - end).norm() / e.norm()))
    return sum(ratios) / len(ratios)


def sharpness(model: nn.Module, weights: Tensor, images: Tensor, labels: Tensor, *, rho: float) -> float:
    """By how much the loss rises at the worst adaptive perturbation of size rho, to first order."""

    def loss(own: Weights) -> Tensor:
        return F.cross_entropy(functional_call(model, own, (images,)), labels)

    here = unflatten(model, weights)
    gradients = grad(loss)(here)
    step = adaptive_perturbation(list(here.values()), list(gradients.values()), rho=rho)
    moved = {name: weight + e for (name, weight), e in zip(here.items(), step, strict=True)}
    with torch.no_grad():
        return float(loss(moved) - loss(here))
