"""A teacher cache whose files are damaged, missing or half written; a filling that is killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import Run
from stillhouse.base.errors import DataError
from stillhouse.teachers.cache import DenseColumn, TeacherCache, TopKColumn, fill_stage

VALUES = torch.randn(20, 6, 30, generator=torch.Generator().manual_seed(0)) * 3


class Teacher:
    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.dies_at = dies_at

    def __call__(self, ids: list[int]) -> dict[str, torch.Tensor]:
        if self.dies_at in ids:
            raise KeyboardInterrupt
        self.asked += ids
        return {"logits": VALUES[ids], "x": VALUES[ids, 0]}


def cache_of(folder: Path, teacher: Any = None) -> TeacherCache:
    columns = {"logits": TopKColumn(5, 30), "x": DenseColumn()}
    return TeacherCache(folder, columns, 20, compute=teacher, shard_samples=5, batch=3)


def everything(cache: TeacherCache) -> dict[str, torch.Tensor]:
    found = cache.read(range(20))
    return {f"{name}/{part}": tensor for name, parts in found.items() for part, tensor in parts.items()}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache_of(tmp_path / "cache", Teacher()).fill()
    return tmp_path / "cache"


def flip(file: Path, place: float) -> None:
    raw = bytearray(file.read_bytes())
    raw[int(place * (len(raw) - 1))] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "a bit at the beginning": lambda file: flip(file, 0.0),
    "a bit in the middle": lambda file: flip(file, 0.5),
    "the last bit": lambda file: flip(file, 1.0),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "no record": lambda file: file.with_suffix(".json").unlink(),
    "a record that is no JSON": lambda file: file.with_suffix(".json").write_text("{"),
    "a record of something else": lambda file: file.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_found_and_it_alone_computed_again(filled, damage):
    before = everything(cache_of(filled))
    damage(filled / "00002.safetensors")
    with pytest.raises(DataError, match=r"shard 2 is missing or damaged; fill it again"):
        cache_of(filled).read([11])
    cache_of(filled).read([0, 9, 19])  # the others are as they were
    teacher = Teacher()
    assert cache_of(filled, teacher).damaged() == [2]
    assert cache_of(filled, teacher).fill() == [2]
    assert teacher.asked == [10, 11, 12, 13, 14]
    after = everything(cache_of(filled))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_with_the_teacher_at_hand_reading_repairs(filled):
    before = everything(cache_of(filled))
    flip(filled / "00001.safetensors", 0.7)
    teacher = Teacher()
    after = everything(cache_of(filled, teacher))
    assert teacher.asked == [5, 6, 7, 8, 9]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert cache_of(filled).damaged() == []


@pytest.mark.parametrize("damage", [DAMAGE["a bit in the middle"], DAMAGE["missing"], DAMAGE["no record"]])
def test_a_damaged_codebook_is_made_again(filled, damage):
    before = everything(cache_of(filled))
    damage(filled / "shared.safetensors")
    with pytest.raises(DataError, match=r"shared\.safetensors is missing or damaged"):
        cache_of(filled).read([0])
    after = everything(cache_of(filled, Teacher()))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert cache_of(filled).damaged() == []


def test_a_damaged_plan_is_not_trusted(filled):
    (filled / "cache.json").write_text("{}")
    with pytest.raises(DataError, match="no cache of this teacher"):
        cache_of(filled).read([0])
    assert cache_of(filled, Teacher()).fill() == [0, 1, 2, 3]


def test_a_killed_filling_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache_of(tmp_path, Teacher(dies_at=11)).fill()
    assert cache_of(tmp_path).damaged() == [2, 3]
    teacher = Teacher()
    assert cache_of(tmp_path, teacher).fill() == [2, 3]
    assert teacher.asked == list(range(10, 20))


def test_a_killed_stage_goes_on_where_it_was(tmp_path):
    def stage(teacher: Teacher) -> Any:
        return fill_stage("teacher-cache", lambda folder: cache_of(folder, teacher))

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "run", quiet=True).execute([stage(Teacher(dies_at=16))])
    teacher = Teacher()
    done = Run(tmp_path / "run", quiet=True).execute([stage(teacher)])["teacher-cache"]
    assert teacher.asked == [15, 16, 17, 18, 19]
    assert cache_of(done.path).damaged() == []
    assert json.loads((done.path / "cache.json").read_text())["samples"] == 20


def test_a_teacher_that_answers_with_too_few_rows_stores_nothing(tmp_path):
    cache = cache_of(tmp_path, lambda ids: {"logits": VALUES[ids[:1]], "x": VALUES[ids, 0]})
    with pytest.raises(DataError, match="no output 'logits' with a row for each of 3 samples"):
        cache.fill()
    assert not list(tmp_path.glob("0*"))


def test_values_that_are_not_finite_store_nothing(tmp_path):
    huge = TeacherCache(tmp_path, {"x": DenseColumn("float16")}, 1, compute=lambda ids: {"x": torch.full((1, 2), 1e9)})
    with pytest.raises(DataError, match="not finite in float16"):
        huge.fill()
    assert not list(tmp_path.glob("*.safetensors"))
