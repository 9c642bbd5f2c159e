"""Files that appear whole or not at all, state trees, random states."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse.base.errors import RunError
from stillhouse.base.files import (
    Checkpoints,
    load_tree,
    random_state,
    read_json,
    restore_random_state,
    save_tree,
    seed_all,
    whole_file,
    whole_folder,
    write_json,
)

one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full(path: Path) -> None:
    """Write a little, then run out of disk."""
    path.write_text("half")
    raise OSError(28, "No space left on device")


# -- whole or not at all --------------------------------------------------------------------------------------------


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system: the rename is one step
    assert path.read_text() == "new"
    assert names(tmp_path) == ["deep", "deep/file.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text(f"{1 / 0}")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_a_clear_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    match = r"could not write .*file\.txt: .*No space left.*free some space"
    with pytest.raises(RunError, match=match), whole_file(path) as temporary:
        full(temporary)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_appears_at_the_end_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "artifact"
    with whole_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not path.exists()
    with whole_folder(path) as temporary:
        (temporary / "b").write_text("2")
        assert (path / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["artifact", "artifact/b"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "artifact"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("1")
    for failing, raised in ((lambda _: 1 / 0, ZeroDivisionError), (full, RunError)):
        with pytest.raises(raised), whole_folder(path) as temporary:
            failing(temporary / "b")
    assert names(tmp_path) == ["artifact", "artifact/a"]


def test_what_a_killed_writer_left_is_not_taken_for_the_folder(tmp_path):
    path = tmp_path / "artifact"
    code = f"""
import os
from pathlib import Path
from stillhouse.base.files import whole_folder
with whole_folder(Path({str(path)!r})) as temporary:
    (temporary / "a").write_text("1")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not path.exists()
    with whole_folder(path) as temporary:
        (temporary / "b").write_text("2")
    assert names(path) == ["b"]


def test_json(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": [1, None, "é"], "where": Path("x")})
    assert read_json(path) == {"a": [1, None, "é"], "where": "x"}
    path.write_text('{"a": ')
    with pytest.raises(RunError, match=r"cannot read .*value\.json"):
        read_json(path)
    with pytest.raises(RunError, match=r"cannot read .*missing\.json"):
        read_json(tmp_path / "missing.json")


# -- trees ----------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bytes_of(one).equal(bytes_of(other))
            if one.ndim and one.numel()
            else torch.equal(one, other) and one.dtype == other.dtype
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensor = (10 * torch.randn(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    if tensor.ndim >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)  # not contiguous
    if tensor.ndim and len(tensor) > 1 and draw(st.booleans()):
        tensor = tensor[1:]  # part of a larger storage
    return tensor


scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(tree=trees)
@one_folder
def test_trees_come_back(tree, tmp_path):
    save_tree(tmp_path / "tree", tree)
    assert same(tree, load_tree(tmp_path / "tree"))
    assert names(tmp_path / "tree") == ["state.json", "state.safetensors"]


@given(count=st.integers(1, 4), shape=st.sampled_from([(), (3,), (2, 3), (1, 1)]))
@one_folder
def test_shared_tensors_are_stored_once_and_shared_again(count, shape, tmp_path):
    tensor = torch.randn(shape)
    save_tree(tmp_path / "tree", {"shared": [tensor] * count, "own": tensor.clone()})
    found = load_tree(tmp_path / "tree")
    assert len({id(one) for one in found["shared"]}) == 1
    assert found["own"] is not found["shared"][0]
    assert torch.equal(found["own"], tensor) and torch.equal(found["shared"][0], tensor)


def test_views_of_one_storage(tmp_path):
    """The same memory in other shapes, parts and types."""
    base = torch.arange(12.0)
    tree = {
        "base": base,
        "reshaped": base.view(3, 4),
        "turned": base.view(3, 4).T,
        "part": base[2:7],
        "strided": base[::2],
        "repeated": base[:1].expand(5),
        "bytes": base.view(torch.uint8),
        "scalar": base[3],
    }
    save_tree(tmp_path / "tree", tree)
    assert same(tree, load_tree(tmp_path / "tree"))


def test_parts_of_one_storage(tmp_path):
    base = torch.arange(12.0)
    tree = {"left": base[:6], "right": base[6:], "overlapping": base[3:9], "even": base[::2]}
    save_tree(tmp_path / "tree", tree)
    assert same(tree, load_tree(tmp_path / "tree"))


def test_a_part_does_not_bring_the_whole_with_it(tmp_path):
    save_tree(tmp_path / "tree", {"part": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "tree" / "state.safetensors").stat().st_size < 1000


def test_what_a_checkpoint_cannot_hold_is_said(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        save_tree(tmp_path / "tree", {"a": {1, 2}})
    assert names(tmp_path) == []


def test_optimizer_states_come_back(tmp_path):
    """What training saves: whole-number keys, step counters, moments, parameter groups."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    state = optimizer.state_dict()
    save_tree(tmp_path / "tree", state)
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    other.load_state_dict(load_tree(tmp_path / "tree"))
    assert same(state["state"], other.state_dict()["state"])
    assert other.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"] or list(
        other.param_groups[0]["betas"]
    ) == list(optimizer.param_groups[0]["betas"])


@pytest.mark.parametrize("damage", ["json", "tensors", "missing", "cut", "name"])
def test_damage_is_said(tmp_path, damage):
    folder = tmp_path / "tree"
    save_tree(folder, {"a": torch.ones(5)})
    tensors, structure = folder / "state.safetensors", folder / "state.json"
    if damage == "json":
        structure.write_text(structure.read_text()[:-5])
    elif damage == "tensors":
        tensors.write_bytes(b"nonsense")
    elif damage == "missing":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        structure.write_text(json.dumps({"tensor": "7"}))
    with pytest.raises(RunError, match=r"the checkpoint .*tree is damaged"):
        load_tree(folder)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    for step in (5, 1000, 20):
        checkpoints.save(step, {"step": step})
    assert [int(folder.name) for folder in checkpoints.all()] == [20, 1000]
    assert checkpoints.latest() == {"step": 1000}
    checkpoints.clear()
    assert checkpoints.all() == []


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"step": step})
    (checkpoints.all()[-1] / "state.json").write_text("{")
    assert checkpoints.latest() == {"step": 1}


def test_saving_never_leaves_the_disk_without_a_checkpoint(tmp_path, monkeypatch):
    """The old one goes only when the new one is whole."""
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"step": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="what was saved before is intact"):
        checkpoints.save(2, {"step": 2})
    assert checkpoints.latest() == {"step": 1}


# -- random states --------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    return [*numbers, float(torch.rand(())), float(torch.randn(()))]


@pytest.mark.parametrize("odd", [0, 1])
def test_random_states_come_back_through_a_checkpoint(tmp_path, odd):
    """Also when a generator holds the second number of a pair back."""
    seed_all(1)
    for _ in range(odd):
        random.gauss(0, 1), np.random.randn(), torch.randn(())
    save_tree(tmp_path / "state", random_state())
    expected = [draw() for _ in range(3)]
    seed_all(2)
    draw()
    restore_random_state(load_tree(tmp_path / "state"))
    assert [draw() for _ in range(3)] == expected


def test_seeds_depend_on_every_part():
    seeds = [seed_all(*parts) for parts in ((0,), (1,), (0, "a"), (0, "b"), ("0", "a"), (0, "a", 1))]
    assert len(set(seeds)) == len(seeds)
    first = (seed_all(0, "a"), draw())
    assert (seed_all(0, "a"), draw()) == first
