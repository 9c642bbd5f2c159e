"""Schedules: where they begin and end, that they do not overshoot, and what steps and fractions mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stillhouse.core.schedule import (
    AdaptiveSchedule,
    Constant,
    Progress,
    constant,
    cosine,
    linear,
    piecewise,
    resolve,
    sigmoid,
    step,
    wsd,
)

RAMPS = [linear, cosine, sigmoid]
values = st.floats(-100, 100).map(lambda value: round(value, 3))
fractions = st.floats(0, 1)
totals = st.integers(1, 5000)


def at(fraction: float) -> Progress:
    return Progress.of(fraction)


def between(low: float, value: float, high: float) -> bool:
    low, high = min(low, high), max(low, high)
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    return low - slack <= value <= high + slack


# -- progress -------------------------------------------------------------------------------------------------------


@given(step=st.integers(0, 10_000), steps=st.integers(0, 5000))
def test_progress_is_a_share(step, steps):
    fraction = Progress(step, steps).fraction
    assert 0 <= fraction <= 1
    if step >= steps:
        assert fraction == 1.0
    if steps:
        assert Progress(0, steps).fraction == 0.0


def test_progress_from_a_number():
    assert Progress.of(0.25).fraction == 0.25
    progress = Progress(3, 7, epoch=2)
    assert Progress.of(progress) is progress


# -- ramps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=values, end=values, fraction=fractions)
def test_ramps_stay_between_their_ends(ramp, start, end, fraction):
    assert between(start, ramp(start, end)(at(fraction)), end)


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=values, end=values, steps=totals)
def test_ramps_hit_their_ends(ramp, start, end, steps):
    schedule = ramp(start, end)
    assert schedule(Progress(0, steps)) == start
    assert schedule(Progress(steps, steps)) == pytest.approx(end, abs=1e-12)
    assert schedule(Progress(steps + 9, steps)) == schedule(Progress(steps, steps))


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=values, end=values, pair=st.tuples(fractions, fractions).map(sorted), begin=fractions, until=fractions)
def test_ramps_go_one_way(ramp, start, end, pair, begin, until):
    assume(begin <= until)
    early, late = (ramp(start, end, begin=begin, until=until)(at(fraction)) for fraction in pair)
    assert between(early, late, end)


@given(fraction=fractions)
def test_shapes_by_formula(fraction):
    x = at(fraction).fraction
    assert linear(2.0, 5.0)(at(x)) == pytest.approx(2 + 3 * x)
    assert cosine(1.0, 0.0)(at(x)) == pytest.approx(0.5 * (1 + math.cos(math.pi * x)))
    raw = [1 / (1 + math.exp(-7 * (u - 0.5))) for u in (x, 0.0, 1.0)]
    assert sigmoid(0.0, 1.0, steepness=7)(at(x)) == pytest.approx((raw[0] - raw[1]) / (raw[2] - raw[1]))
    assert sigmoid(0.0, 1.0)(at(x)) + sigmoid(0.0, 1.0)(at(1 - x)) == pytest.approx(1.0)


def test_begin_and_until():
    schedule = linear(1.0, 3.0, begin=0.25, until=0.75)
    assert [schedule(at(x)) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    jump = linear(1.0, 3.0, begin=0.5, until=0.5)
    assert [jump(at(x)) for x in (0.0, 0.49, 0.5, 1.0)] == [1.0, 1.0, 3.0, 3.0]


@given(steps=st.integers(2, 1000), data=st.data())
def test_whole_numbers_are_steps(steps, data):
    begin = data.draw(st.integers(0, steps - 1))
    until = data.draw(st.integers(begin + 1, steps))
    in_steps, in_shares = (
        linear(0.0, 1.0, begin=begin, until=until),
        linear(0.0, 1.0, begin=begin / steps, until=until / steps),
    )
    for now in range(0, steps + 1, max(1, steps // 20)):
        expected = min(1.0, max(0.0, (now - begin) / (until - begin)))
        assert in_steps(Progress(now, steps)) == pytest.approx(expected, abs=1e-9)
        assert in_shares(Progress(now, steps)) == pytest.approx(expected, abs=1e-9)


def test_one_is_a_step_and_one_point_zero_the_end():
    assert linear(0.0, 1.0, until=1)(Progress(1, 100)) == pytest.approx(1.0)
    assert linear(0.0, 1.0, until=1.0)(Progress(1, 100)) == pytest.approx(0.01)


@pytest.mark.parametrize("ramp", [linear, cosine])
@given(peak=st.floats(0.01, 10), steps=st.integers(20, 500), warmup=st.integers(1, 10))
def test_warmup_rises_from_zero_to_the_start(ramp, peak, steps, warmup):
    schedule = ramp(peak, 0.0, warmup=warmup)
    for now in range(warmup):
        assert schedule(Progress(now, steps)) == pytest.approx(peak * now / warmup)
    assert schedule(Progress(warmup, steps)) == pytest.approx(peak)
    assert schedule(Progress(steps, steps)) == pytest.approx(0.0, abs=1e-9)
    after = [schedule(Progress(now, steps)) for now in range(warmup, steps + 1)]
    assert all(between(later, now, peak) for now, later in itertools.pairwise(after))


def test_warmup_as_a_share():
    schedule = cosine(1.0, 0.0, warmup=0.1)
    assert [schedule(Progress(step, 100)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    assert schedule(Progress(55, 100)) == pytest.approx(0.5)  # half of what is left


def test_a_warmup_that_takes_the_whole_run():
    assert linear(1.0, 0.0, warmup=1.0)(Progress(5, 10)) == 0.5
    assert linear(1.0, 0.0, warmup=10)(Progress(5, 10)) == 0.5


# -- steps, pieces, warm-up stable decay ----------------------------------------------------------------------------


def test_step():
    schedule = step([1.0, 0.1, 0.01], at=[0.5, 80])
    found = [schedule(Progress(now, 100)) for now in (0, 49, 50, 79, 80, 100)]
    assert found == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    with pytest.raises(ValueError, match="3 values, 1 points"):
        step([1.0, 0.5, 0.1], at=[0.5])
    with pytest.raises(ValueError, match="1 values, 1 points"):
        step([1.0], at=[0.5])


@given(
    points=st.lists(st.tuples(fractions, values), min_size=1, max_size=6, unique_by=lambda point: point[0]).map(sorted),
    fraction=fractions,
)
def test_piecewise_against_numpy(points, fraction):
    import numpy as np

    times, heights = zip(*points, strict=True)
    now = at(fraction)
    expected = float(np.interp(now.fraction, times, heights))
    if min((b - a for a, b in itertools.pairwise(times)), default=1.0) > 1e-6:
        assert piecewise(*points)(now) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert between(min(heights), piecewise(*points)(now), max(heights))


def test_piecewise_with_steps_and_jumps():
    schedule = piecewise((0, 1.0), (50, 2.0), (50, 5.0), (1.0, 5.0))
    assert [schedule(Progress(now, 100)) for now in (0, 25, 49, 51, 100)] == pytest.approx([1.0, 1.5, 1.98, 5.0, 5.0])
    assert piecewise((0.5, 3.0))(at(0.1)) == piecewise((0.5, 3.0))(at(0.9)) == 3.0
    with pytest.raises(ValueError, match="at least one"):
        piecewise()


@example(steps=10, warmup=0.0, decay=1e-8, floor=0.0, shape="linear")
@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(10, 1000),
    warmup=st.floats(0, 0.4),
    decay=st.floats(0, 0.5),
    floor=fractions,
    shape=st.sampled_from(["linear", "cosine", "1-sqrt"]),
)
def test_wsd_has_three_phases(steps, warmup, decay, floor, shape):
    schedule = wsd(warmup=warmup, decay=decay, floor=floor, shape=shape)
    found = [schedule(Progress(now, steps)) for now in range(steps + 1)]
    for now, value in enumerate(found):
        x = now / steps
        if x < warmup:
            assert value == pytest.approx(x / warmup)
        elif x < 1 - decay:
            assert value == 1.0
        else:
            assert between(floor, value, 1.0)
    if decay > 1e-6:
        assert found[-1] == pytest.approx(floor, abs=1e-6)
    tail = [value for now, value in enumerate(found) if now / steps >= 1 - decay]
    assert all(between(later, value, 1.0) for value, later in itertools.pairwise(tail))


def test_wsd_shapes_and_steps():
    quarter = Progress(850, 1000)  # a quarter into the decay
    assert wsd(decay=0.2)(quarter) == pytest.approx(0.75)
    assert wsd(decay=0.2, shape="cosine")(quarter) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert wsd(decay=0.2, shape="1-sqrt")(quarter) == pytest.approx(0.5)
    assert wsd(warmup=10, decay=200)(Progress(5, 1000)) == pytest.approx(0.5)
    assert wsd(warmup=10, decay=200, floor=0.2)(quarter) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="no decay shape 'sqrt'; known: linear, cosine, 1-sqrt"):
        wsd(shape="sqrt")


# -- algebra --------------------------------------------------------------------------------------------------------


@given(factor=values, fraction=fractions)
def test_scaling(factor, fraction):
    schedule = cosine(1.0, 3.0)
    for scaled in (factor * schedule, schedule * factor):
        assert scaled(at(fraction)) == pytest.approx(factor * schedule(at(fraction)))


def test_constants_and_numbers():
    assert constant(2.5)(at(0.3)) == Constant(2.5)(at(0.9)) == 2.5
    assert resolve(3, at(0.5)) == 3
    assert resolve(linear(0.0, 1.0), at(0.5)) == 0.5
    with pytest.raises(TypeError):
        "2" * linear(0.0, 1.0)


# -- adaptive -------------------------------------------------------------------------------------------------------


class Mirror(AdaptiveSchedule):
    """The loss it was last told, and all it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros((), dtype=torch.float64))
        self.told: list[tuple[Progress, float]] = []

    def value(self, progress: Progress) -> float:
        return float(self.last)

    def observe(self, loss: float, progress: Progress) -> None:
        self.told.append((progress, loss))
        self.last.fill_(loss)


losses = st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=6)


@given(losses=losses, asks=st.integers(1, 3))
def test_adaptive_schedules_see_the_mean_of_each_step_once(losses, asks):
    schedule = Mirror()
    for now, micro in enumerate(losses):
        for loss in micro:
            for _ in range(asks):
                schedule(Progress(now, len(losses)))
            schedule.record(torch.tensor(loss, dtype=torch.float64), Progress(now, len(losses)))
    assert [progress.step for progress, _ in schedule.told] == list(range(len(losses) - 1))
    schedule(Progress(len(losses), len(losses)))
    assert [loss for _, loss in schedule.told] == pytest.approx([sum(micro) / len(micro) for micro in losses])
    assert [(progress.step, progress.steps) for progress, _ in schedule.told] == [
        (now, len(losses)) for now in range(len(losses))
    ]


@given(losses=losses, cut=st.integers(0, 20))
def test_adaptive_state_can_be_saved_anywhere(losses, cut):
    flat = [(now, loss) for now, micro in enumerate(losses) for loss in micro]
    whole, resumed = Mirror(), Mirror()
    for index, (now, loss) in enumerate(flat):
        if index == cut % len(flat):
            saved, resumed = resumed.state_dict(), Mirror()
            resumed.load_state_dict(saved)
        for schedule in (whole, resumed):
            schedule(Progress(now, len(losses)))
            schedule.record(torch.tensor(loss, dtype=torch.float64), Progress(now, len(losses)))
    end = Progress(len(losses), len(losses))
    assert whole(end) == resumed(end)


def test_a_recorded_loss_is_not_kept_in_the_graph():
    schedule = Mirror()
    schedule.record(torch.ones((), requires_grad=True) * 2, Progress(0, 2))
    assert not schedule.pending.requires_grad
    assert schedule(Progress(1, 2)) == 2.0
