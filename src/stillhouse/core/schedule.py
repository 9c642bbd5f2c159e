"""Schedules: numbers that change over a run. Any weight, temperature or learning rate takes one.

A schedule is called with a `Progress` and returns a float. Points on the time axis (``warmup``, ``begin``,
``until``, ...) are fractions of the run when given as floats, and steps when given as whole numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``step`` of ``steps`` (0-based), and the pass over the data it is in."""

    step: int
    steps: int
    epoch: int = 0

    @property
    def fraction(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else 1.0

    @staticmethod
    def of(value: Progress | float) -> Progress:
        """A ``Progress`` from a fraction between 0 and 1, for loops that do not count steps."""
        return value if isinstance(value, Progress) else Progress(round(value * 1_000_000), 1_000_000)


class Schedule:
    """A number that depends on progress. ``2 * schedule`` scales it, ``schedule * objective`` weighs a term."""

    def __call__(self, progress: Progress) -> float:
        raise NotImplementedError

    def __rmul__(self, factor: float) -> Schedule:
        return Scaled(self, factor) if isinstance(factor, int | float) else NotImplemented

    def __mul__(self, other: float) -> Schedule:
        return self.__rmul__(other)


def fraction_of(point: float, progress: Progress) -> float:
    """Turn a point in time into a fraction of the run: whole numbers are steps, floats are fractions."""
    return point / max(1, progress.steps) if isinstance(point, int) and not isinstance(point, bool) else point


@dataclass(frozen=True)
class Constant(Schedule):
    value: float

    def __call__(self, progress: Progress) -> float:
        return self.value


@dataclass(frozen=True)
class Scaled(Schedule):
    inner: Schedule
    factor: float

    def __call__(self, progress: Progress) -> float:
        return self.factor * self.inner(progress)


@dataclass(frozen=True)
class Ramp(Schedule):
    """From ``start`` to ``end`` along ``shape`` between ``begin`` and ``until``, after a linear warm-up from 0."""

    start: float
    end: float
    shape: Callable[[float], float]
    begin: float = 0.0
    until: float = 1.0
    warmup: float = 0.0

    def __call__(self, progress: Progress) -> float:
        now = progress.fraction
        warmup = fraction_of(self.warmup, progress)
        if now < warmup:
            return self.start * now / warmup
        begin = max(fraction_of(self.begin, progress), warmup)
        until = fraction_of(self.until, progress)
        along = min(1.0, max(0.0, (now - begin) / (until - begin))) if until > begin else float(now >= until)
        return self.start + (self.end - self.start) * self.shape(along)


def _straight(x: float) -> float:
    return x


def _half_cosine(x: float) -> float:
    return (1 - math.cos(math.pi * x)) / 2


@dataclass(frozen=True)
class _Logistic:
    steepness: float

    def __call__(self, x: float) -> float:
        def logistic(u: float) -> float:
            return 1 / (1 + math.exp(-self.steepness * (u - 0.5)))

        low, high = logistic(0.0), logistic(1.0)
        return (logistic(x) - low) / (high - low)


def constant(value: float) -> Schedule:
    """Always ``value``."""
    return Constant(value)


def linear(start: float, end: float, *, begin: float = 0.0, until: float = 1.0, warmup: float = 0.0) -> Schedule:
    """A straight line from ``start`` to ``end``."""
    return Ramp(start, end, _straight, begin, until, warmup)


def cosine(start: float, end: float, *, begin: float = 0.0, until: float = 1.0, warmup: float = 0.0) -> Schedule:
    """Half a cosine from ``start`` to ``end`` (Loshchilov and Hutter, 2017, one cycle)."""
    return Ramp(start, end, _half_cosine, begin, until, warmup)


def sigmoid(start: float, end: float, *, steepness: float = 10.0, begin: float = 0.0, until: float = 1.0) -> Schedule:
    """A logistic curve that starts exactly at ``start`` and ends exactly at ``end``."""
    return Ramp(start, end, _Logistic(steepness), begin, until)


@dataclass(frozen=True)
class Step(Schedule):
    values: tuple[float, ...]
    at: tuple[float, ...]

    def __call__(self, progress: Progress) -> float:
        passed = sum(progress.fraction >= fraction_of(point, progress) for point in self.at)
        return self.values[passed]


def step(values: Sequence[float], *, at: Sequence[float]) -> Schedule:
    """``values[0]`` until ``at[0]``, then ``values[1]`` until ``at[1]``, and so on."""
    if len(values) != len(at) + 1:
        raise ValueError(f"step needs one more value than points: {len(values)} values, {len(at)} points")
    return Step(tuple(values), tuple(at))


@dataclass(frozen=True)
class Piecewise(Schedule):
    points: tuple[tuple[float, float], ...]

    def __call__(self, progress: Progress) -> float:
        now = progress.fraction
        spots = [(fraction_of(time, progress), value) for time, value in self.points]
        if now <= spots[0][0]:
            return spots[0][1]
        for (t0, v0), (t1, v1) in itertools.pairwise(spots):
            if now <= t1:
                return v0 + (v1 - v0) * (now - t0) / (t1 - t0) if t1 > t0 else v1
        return spots[-1][1]


def piecewise(*points: tuple[float, float]) -> Schedule:
    """Straight lines through ``(time, value)`` points; flat before the first and after the last."""
    if not points:
        raise ValueError("piecewise needs at least one (time, value) point")
    return Piecewise(tuple(points))


@dataclass(frozen=True)
class WSD(Schedule):
    warmup: float
    decay: float
    floor: float
    shape: Callable[[float], float]

    def __call__(self, progress: Progress) -> float:
        now = progress.fraction
        warmup, decay = fraction_of(self.warmup, progress), fraction_of(self.decay, progress)
        if now < warmup:
            return now / warmup
        if decay <= 0 or now < 1 - decay:
            return 1.0
        return 1 - (1 - self.floor) * self.shape(min(1.0, (now - (1 - decay)) / decay))


def wsd(*, warmup: float = 0.1, decay: float = 0.1, floor: float = 0.0, shape: str = "linear") -> Schedule:
    """Warm-up, stable, decay (Hu et al., 2024, MiniCPM): 0 to 1, flat, then down to ``floor``.

    ``shape`` of the decay: ``linear``, ``cosine`` or ``1-sqrt`` (Haegele et al., 2024).
    """
    shapes = {"linear": _straight, "cosine": _half_cosine, "1-sqrt": math.sqrt}
    if shape not in shapes:
        raise ValueError(f"wsd has no decay shape {shape!r}; known: {', '.join(shapes)}")
    return WSD(warmup, decay, floor, shapes[shape])


class AdaptiveSchedule(nn.Module):
    """A schedule that looks at the loss it steers. Its state lives in buffers and is saved with the run.

    A term that holds one calls it for the value, then reports the term's loss through `record`. What was recorded
    during a step (all micro-batches, all processes) is averaged and handed to `observe` once, before the value for
    the next step is asked for. Subclasses write `value` and `observe`.
    """

    pending: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pending", torch.zeros(4, dtype=torch.float64))  # sum, count, step, steps

    def value(self, progress: Progress) -> float:
        """The number to use now."""
        raise NotImplementedError

    def observe(self, loss: float, progress: Progress) -> None:
        """Take in the mean loss of the step that ``progress`` describes."""
        raise NotImplementedError

    def forward(self, progress: Progress) -> float:
        total, count, step, steps = self.pending.tolist()
        if count and int(step) != progress.step:
            mean = torch.tensor(total / count, dtype=torch.float64)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean, op=torch.distributed.ReduceOp.SUM)
                mean /= torch.distributed.get_world_size()
            self.observe(mean.item(), Progress(int(step), int(steps), progress.epoch))
            self.pending.zero_()
        return self.value(progress)

    def record(self, loss: Tensor, progress: Progress) -> None:
        """Note one loss of the current step; ignored in evaluation mode."""
        if self.training:
            self.pending += self.pending.new_tensor([float(loss.detach()), 1.0, 0.0, 0.0])
            self.pending[2:] = self.pending.new_tensor([progress.step, progress.steps])

    def __rmul__(self, factor: object) -> object:
        return NotImplemented


Scheduled = float | Schedule | AdaptiveSchedule
"""What a weight or a temperature may be given as."""


def resolve(value: Scheduled, progress: Progress) -> float:
    """The number that ``value`` stands for at this point of the run."""
    return value if isinstance(value, int | float) else value(progress)
