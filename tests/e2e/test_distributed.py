"""Two CPU processes on gloo end with the weights of one process: DDP and FSDP2, one player and three."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillhouse.base.files import load_tree

SCRIPT = Path(__file__).with_name("distributed_job.py")


def start(
    folder: Path, job: str, strategy: str, processes: int, *, fails: bool = False
) -> list[dict[str, torch.Tensor]]:
    words = [str(SCRIPT), str(folder), job, strategy, str(processes)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return [] if fails else load_tree(folder / "end")


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {
        job: start(tmp_path_factory.mktemp(job) / "run", job, "auto", 1)
        for job in ("one", "plain", "three", "language", "few labels")
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("job", ["one", "three", "language", "few labels"])
def test_two_processes_match_one(tmp_path: Path, alone: dict, job: str, strategy: str) -> None:
    assert_same(start(tmp_path / "run", job, strategy, 2), alone[job])


@pytest.mark.parametrize("job", ["plain", "three"])
def test_deepspeed_matches_one_process(tmp_path: Path, alone: dict, job: str) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    assert_same(start(tmp_path / "run", job, "deepspeed", 2), alone[job])


def test_a_sharded_run_resumes_from_its_checkpoint(tmp_path: Path, alone: dict) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "crash").touch()
    start(folder, "one", "fsdp2", 2, fails=True)
    assert list((folder / "stages" / "01-one" / "checkpoints").glob("*5")), "no checkpoint before the crash"
    assert_same(start(folder, "one", "fsdp2", 2), alone["one"])
