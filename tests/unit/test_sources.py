"""Sources: the same batches every time, everything once a pass, and no batch lost or doubled by a resume."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.source import Repeat, Source, as_source
from stillhouse.data.sources import Batches, Drawn, Wrapped, passes_in, steps_in


def take(source: Any, count: int) -> list[list[int]]:
    return [next(source).tolist() for _ in range(count)]


def batches(items: int, size: int, **options: Any) -> Batches:
    return Batches(torch.arange(items), size, gather=True, **options)


# -- batches --------------------------------------------------------------------------------------------------------


@given(items=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 99), passes=st.integers(1, 4))
def test_everything_once_a_pass(items, size, seed, passes):
    source = batches(items, size, seed=seed)
    per_pass = items // min(size, items)
    assert len(source) == per_pass
    for epoch in range(passes):
        seen = []
        for _ in range(per_pass):
            seen += next(source).tolist()
            assert source.epoch == epoch
        assert len(seen) == len(set(seen)) == per_pass * min(size, items)
        assert set(seen) <= set(range(items))


def test_order_depends_on_seed_and_epoch_only():
    first, again, other = (take(batches(20, 5, seed=seed), 12) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    passes = [first[:4], first[4:8], first[8:]]
    assert passes[0] != passes[1] != passes[2]
    assert all(sorted(functools.reduce(operator.iadd, one, [])) == list(range(20)) for one in passes)
    torch.manual_seed(123)
    torch.randn(10)
    assert take(batches(20, 5, seed=3), 12) == first  # global random state plays no part


def test_unshuffled():
    assert take(batches(4, 2, shuffle=False), 3) == [[0, 1], [2, 3], [0, 1]]


def test_unshuffled_reads_next_what_a_pass_left_out():
    source = batches(5, 2, shuffle=False)
    assert take(source, 3) == [[0, 1], [2, 3], [4, 0]]
    state = source.state_dict()
    fresh = batches(5, 2, shuffle=False)
    fresh.load_state_dict(state)
    assert take(fresh, 2) == take(source, 2) == [[1, 2], [3, 4]]


@given(items=st.integers(4, 60), world=st.integers(1, 4), each=st.integers(1, 4), seed=st.integers(0, 9))
def test_processes_share_each_batch(items, world, each, seed):
    size = world * each
    if size > items:
        return
    whole = batches(items, size, seed=seed)
    shards = [batches(items, size, seed=seed) for _ in range(world)]
    for rank, shard in enumerate(shards):
        shard.shard = (rank, world)
    for _ in range(2 * len(whole) + 1):
        parts = [next(shard).tolist() for shard in shards]
        assert all(len(part) == each for part in parts)
        assert sorted(functools.reduce(operator.iadd, parts, [])) == sorted(next(whole).tolist())


def test_a_batch_that_cannot_be_shared_is_refused():
    source = batches(10, 5)
    source.shard = (0, 2)
    with pytest.raises(ValueError, match="batch size 5 does not divide among 2 processes"):
        next(source)


@given(items=st.integers(1, 20), size=st.integers(1, 7), before=st.integers(0, 30), after=st.integers(1, 30))
def test_batches_go_on_where_they_stood(items, size, before, after):
    source = batches(items, size, seed=1)
    take(source, before)
    state = source.state_dict()
    fresh = batches(items, size, seed=1)
    fresh.load_state_dict(state)
    assert take(fresh, after) == take(source, after)
    assert fresh.epoch == source.epoch
    used = batches(items, size, seed=1)  # also one that has moved on, to another pass
    take(used, 2 * items + 1)
    used.load_state_dict(state)
    source.load_state_dict(state)
    assert take(used, after) == take(source, after)


def test_collating():
    pairs = [(torch.full((2,), float(index)), index) for index in range(6)]
    inputs, labels = next(Batches(pairs, 3, shuffle=False))
    assert torch.equal(inputs, torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
    assert labels.tolist() == [0, 1, 2]
    assert next(Batches("abcdef", 4, shuffle=False, collate="".join)) == "abcd"
    with pytest.raises(ValueError, match="the data set is empty"):
        Batches([], 3)


def test_batches_are_sources():
    source = batches(4, 2)
    assert isinstance(source, Source) and as_source(source) is source
    assert iter(source) is source


# -- repeat ---------------------------------------------------------------------------------------------------------


def test_repeat_goes_round():
    source = Repeat(["a", "b", "c"])
    assert [(next(source), source.epoch) for _ in range(7)] == [
        ("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1), ("a", 2),
    ]  # fmt: skip


@given(length=st.integers(1, 6), before=st.integers(0, 20), after=st.integers(1, 10))
def test_repeat_goes_on_where_it_stood(length, before, after):
    source = Repeat(range(length))
    for _ in range(before):
        next(source)
    fresh = Repeat(range(length))
    fresh.load_state_dict(source.state_dict())
    assert [next(fresh) for _ in range(after)] == [next(source) for _ in range(after)]
    assert fresh.epoch == source.epoch


def test_repeat_of_nothing():
    source = Repeat([])
    with pytest.raises(ValueError, match="yields no batch"):
        next(source)


def test_repeat_of_something_that_can_be_read_once_only():
    """A generator cannot start again; that must be said, not end as a StopIteration in the middle of a run."""
    source = as_source(number for number in range(2))
    assert [next(source), next(source)] == [0, 1]
    with pytest.raises(ValueError, match="batch"):
        next(source)


def test_loaders_become_sources():
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2)
    source = as_source(loader)
    assert take(source, 3) == [[0, 1], [2, 3], [0, 1]]
    with pytest.raises(TypeError, match="a source must yield batches; int does not"):
        as_source(3)


# -- drawn ----------------------------------------------------------------------------------------------------------


def noise(seed: int = 0) -> Drawn:
    return Drawn(lambda generator: torch.randn(3, generator=generator), seed=seed)


def test_drawn_batches_repeat_themselves():
    first, again = take(noise(), 5), take(noise(), 5)
    assert first == again
    assert len({tuple(batch) for batch in first + take(noise(1), 5)}) == 10


def test_processes_draw_different_batches():
    drawn = set()
    for world in (1, 3):
        for rank in range(world):
            source = noise()
            source.shard = (rank, world)
            drawn |= {tuple(batch) for batch in take(source, 4)} if world == 3 else set()
    assert len(drawn) == 12


@given(before=st.integers(0, 10), after=st.integers(1, 5))
def test_drawn_goes_on_where_it_stood(before, after):
    source = noise()
    take(source, before)
    fresh = noise()
    fresh.load_state_dict(source.state_dict())
    assert take(fresh, after) == take(source, after)


@pytest.mark.parametrize(
    ("items", "size", "accumulate", "steps"), [(100, 32, 2, 15), (1000, 64, 8, 19), (30, 32, 2, 5), (96, 32, 1, 30)]
)
def test_ten_passes_are_ten_passes(items, size, accumulate, steps):
    """Also where a pass is no whole number of optimizer steps, or smaller than a batch."""
    given = {"batch_size": size, "accumulate": accumulate}
    assert steps_in(10, items, **given) == steps
    source = batches(items, size)
    take(source, steps * accumulate)
    assert abs(source.epoch + 1 - 10) <= 1
    assert passes_in(steps, items, **given) == source.epoch + 1


def test_what_draws_from_a_source_hands_its_share_on_to_all():
    class Endless:  # a stream that knows no shares
        epoch = 3

    inner, beside = Batches(torch.arange(8), 4), Batches(torch.arange(8), 4)
    outer = Wrapped(Wrapped(inner, beside, None))
    outer.shard = (1, 2)
    assert inner.shard == beside.shard == outer.shard == (1, 2)
    inner.epoch = 5
    assert outer.epoch == 5
    alone = Wrapped(Endless())
    alone.shard = (1, 2)
    assert alone.shard == (0, 1) and alone.epoch == 3
