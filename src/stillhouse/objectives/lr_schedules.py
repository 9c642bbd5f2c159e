"""Learning rates of one long run that leaves checkpoints on the way: WSD, WSD-S, cyclic cosine, and their branches.

A `Course` is a rate over the steps of the whole run. A plan cuts a method into `Segment`s, each of which goes on from
the end of another: branches share what was trained before they parted. Rates are factors on the peak rate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stillhouse.base.errors import ConfigError
from stillhouse.core.schedule import Progress, Schedule

Form = Callable[[float], float]
"""Share of the decay that is done, in [0, 1] -> factor on the peak rate, 1 at 0."""

Decay = Literal["inverse", "exponential", "linear", "cosine", "1-sqrt"]
Method = Literal["wsd-s", "wsd", "cyclic-cosine", "wsd-runs", "cosine-runs", "cosine-cut", "constant"]


def decay_form(name: Decay, *, floor: float) -> Form:
    """The shape of a decay from 1 to ``floor``.

    ``inverse``: 1/rate grows linearly, u/floor + 1 - u (Wen et al., 2024, arXiv 2410.05192), the greedy optimum in a
    valley of one curvature. ``exponential``: floor^u, that is 0.5^(steps/tau) with floor = 0.5^(length/tau) (Hu et
    al., 2024, arXiv 2404.06395). ``1-sqrt``: Haegele et al. (2024, arXiv 2405.18392).

    Raises:
        ConfigError: a floor outside [0, 1], or 0 where the shape never reaches it.
    """
    if not 0 <= floor <= 1 or (floor == 0 and name in ("inverse", "exponential")):
        raise ConfigError(
            f"floor={floor}: must be in (0, 1] for the decay {name!r}; linear, cosine, 1-sqrt also take 0"
        )

    def form(u: float) -> float:
        if name == "inverse":
            return 1 / (u / floor + 1 - u)
        if name == "exponential":
            return floor**u
        along = {"linear": u, "cosine": (1 - math.cos(math.pi * u)) / 2, "1-sqrt": math.sqrt(u)}[name]
        return 1 - (1 - floor) * along

    return form


@dataclass(frozen=True)
class Piece:
    """Steps ``begin <= step < end`` in which the rate follows ``form``."""

    begin: int
    end: int
    form: Form


@dataclass(frozen=True)
class Course(Schedule):
    """A rate over the steps of a whole run: a linear warm-up from 0, then 1, but for the ``pieces``.

    As a `Schedule` it serves a stage whose step 0 is step ``begin`` of the run.
    """

    pieces: tuple[Piece, ...] = ()
    warmup: int = 0
    begin: int = 0

    def at(self, step: int) -> float:
        """The factor at a step of the whole run."""
        rise = step / self.warmup if step < self.warmup else 1.0
        inside = next((piece for piece in self.pieces if piece.begin <= step < piece.end), None)
        return rise if inside is None else rise * inside.form((step - inside.begin) / (inside.end - inside.begin))

    def __call__(self, progress: Progress) -> float:
        return self.at(self.begin + progress.step)


@dataclass(frozen=True)
class Segment:
    """A part of a plan: steps ``begin`` to ``end`` of a run, on from the end of the segment ``start``.

    Attributes:
        target: the number of the target whose checkpoint its end is; None for those that lead there.
        rate: the course, beginning at ``begin``.
    """

    name: str
    begin: int
    end: int
    start: str | None
    rate: Course
    target: int | None = None


def wsd_s(targets: Sequence[int], *, form: Form, decay: float = 0.1, warmup: int = 0) -> Course:
    """WSD-S (Wen et al., 2024, arXiv 2410.05192): the peak rate, but for [(1 - decay) T, T] before each target T.

    After a target the rate jumps back, without a new warm-up. With one target this is WSD.
    """
    return Course(tuple(Piece(end - _length(end, decay), end, form) for end in targets), warmup)


def cyclic_cosine(targets: Sequence[int], *, floor: float = 0.1, warmup: int = 0) -> Course:
    """Half a cosine from the peak rate to ``floor`` before each target, begun anew after it."""
    form = decay_form("cosine", floor=floor)
    return Course(tuple(Piece(begin, end, form) for begin, end in itertools.pairwise([0, *targets])), warmup)


def _length(target: int, decay: float) -> int:
    return max(1, round(decay * target))


def plan(
    method: Method,
    targets: Sequence[int],
    *,
    form: Form,
    floor: float,
    decay: float = 0.1,
    warmup: int = 0,
    charged: bool = True,
) -> list[Segment]:
    """The segments by which ``method`` makes a checkpoint at each of ``targets``, steps of the whole budget.

    ``wsd-s`` and ``cyclic-cosine`` are one run. ``wsd`` trains one main branch at the peak rate and a decay from it
    for each target; the steps of earlier decays are charged, so that when a checkpoint is ready as many steps have
    been made in all as the others need (``charged`` off: each checkpoint has its target's steps; more are made in all).
    ``wsd-runs`` and ``cosine-runs`` spend a run of its own on every target (oracles: they cost the sum of the targets).
    ``constant`` never decays; ``cosine-cut`` is a cosine over twice the last target, stopped half-way.

    Raises:
        ConfigError: targets that do not rise, or decays that leave no stable step between two of them.
    """
    if not targets or any(later <= earlier for earlier, later in itertools.pairwise([0, *targets])):
        raise ConfigError(f"targets={list(targets)}: must rise from above 0; use fewer of them, or more steps")
    if method in ("wsd-runs", "cosine-runs"):
        rates = [
            wsd_s([end], form=form, decay=decay, warmup=warmup)
            if method == "wsd-runs"
            else cyclic_cosine([end], floor=floor, warmup=warmup)
            for end in targets
        ]
        return [Segment(f"run-{k + 1}", 0, end, None, rates[k], k) for k, end in enumerate(targets)]
    if method in ("cyclic-cosine", "constant", "cosine-cut"):
        rate = Course((), warmup)
        if method == "cyclic-cosine":
            rate = cyclic_cosine(targets, floor=floor, warmup=warmup)
        elif method == "cosine-cut":
            rate = cyclic_cosine([2 * targets[-1]], floor=floor, warmup=warmup)
        return _chained([(f"cycle-{k + 1}", end, k) for k, end in enumerate(targets)], rate)
    lengths = [_length(end, decay) for end in targets]
    if method == "wsd-s":
        rate = wsd_s(targets, form=form, decay=decay, warmup=warmup)
        parts: list[tuple[str, int, int | None]] = []
        for k, (end, length) in enumerate(zip(targets, lengths, strict=True)):
            parts += [(f"stable-{k + 1}", end - length, None), (f"decay-{k + 1}", end, k)]
        return _chained(parts, rate)
    spent = itertools.accumulate(lengths) if charged else lengths
    parted = [end - steps for end, steps in zip(targets, spent, strict=True)]
    segments = []
    main = _chained([(f"stable-{k + 1}", end, None) for k, end in enumerate(parted)], Course((), warmup))
    for k, (stable, length) in enumerate(zip(main, lengths, strict=True)):
        rate = Course((Piece(stable.end, stable.end + length, form),), warmup, begin=stable.end)
        segments += [stable, Segment(f"decay-{k + 1}", stable.end, stable.end + length, stable.name, rate, k)]
    return segments


def low_branch(segments: Sequence[Segment], rate: float) -> Segment | None:
    """A branch beside the last decay of a plan: from the same stable weights, as many steps at the constant ``rate``.

    Its loss falls too, but more slowly (Wen et al., 2024, arXiv 2410.05192): in a valley of curvature gamma the
    variance up the hill comes by (1 - rate gamma)^2 a step to that of the low rate. None where no stable segment leads
    to the last target.
    """
    last = segments[-1]
    before = next((segment for segment in segments if segment.name == last.start), None)
    if before is None or before.target is not None:
        return None
    course = replace(last.rate, pieces=(Piece(last.begin, last.end, lambda _u: rate),))
    return replace(last, name="low", rate=course, target=None)


def _chained(parts: Sequence[tuple[str, int, int | None]], rate: Course) -> list[Segment]:
    """One run, cut at the ends of its parts."""
    segments: list[Segment] = []
    for name, end, target in parts:
        before = segments[-1] if segments else None
        begin = before.end if before else 0
        if end <= begin:
            raise ConfigError(f"no step is left for {name}: it would end at {end}, where another does; decay less")
        start = before.name if before else None
        segments.append(Segment(name, begin, end, start, replace(rate, begin=begin), target))
    return segments
