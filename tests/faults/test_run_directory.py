"""What is found in a run's directory: half-written files, other configurations, other processes."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from _systems import PLOTS, Job, Small, Trap, checkpoints
from safetensors.torch import load_file

from stillhouse.base.errors import RunError
from stillhouse.base.files import sweep
from stillhouse.core.run import Run
from stillhouse.core.stage import Transform
from stillhouse.workflow import resume

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("reference"), "kd")
    assert job.go() == 0, job.said
    return job.outcome()


@pytest.fixture
def killed(tmp_path):
    """A run killed after step 7; its newest checkpoint is of step 6."""
    job = Job(tmp_path, "kd")
    assert job.go(Trap("torch.optim:AdamW.step", 8)) == KILLED, job.said
    assert [folder.name for folder in checkpoints(job)] == ["000000006"]
    return job


# -- half-written and damaged files ---------------------------------------------------------------------------------


def cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_damaged_checkpoint_is_passed_over(name, share, killed, reference):
    """With no older one the stage begins anew, and ends the same."""
    cut(checkpoints(killed)[-1] / name, share)
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference


def test_a_checkpoint_without_a_file_is_passed_over(killed, reference):
    (checkpoints(killed)[-1] / "state.safetensors").unlink()
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference


def test_an_older_checkpoint_is_used_when_the_newest_is_damaged(tmp_path, reference):
    """As after a kill between the writing of the newest and the removal of the one before."""
    job = Job(tmp_path, "kd")
    assert job.go(Trap("stillhouse.base.files:save_tree", 2, "after")) == KILLED
    older, newest = checkpoints(job)
    assert (older.name, newest.name) == ("000000003", "000000006")
    cut(newest / "state.safetensors")
    counts = "stillhouse.core.train:_Loop._one_step"
    assert job.count(counts) == 9  # steps 4 to 12
    assert job.outcome() == reference


def test_the_newest_checkpoint_is_used(killed, reference):
    assert killed.count("stillhouse.core.train:_Loop._one_step") == 6  # steps 7 to 12
    assert killed.outcome() == reference


def test_a_half_written_line_of_figures(killed, reference):
    file = killed.folder / "stages/01-student/metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 7, "kind": "train", "loss": 0.')
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference


def test_lines_after_the_checkpoint_are_written_once(killed, reference):
    """Lines of steps that will be done again go first."""
    file = killed.folder / "stages/01-student/metrics.jsonl"
    *_, last = file.read_text().splitlines()
    file.write_text(file.read_text() + json.dumps({**json.loads(last), "step": 7}) + "\n")
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference


def test_what_a_killed_writer_left_is_harmless_and_goes(killed, reference):
    stage = killed.folder / "stages/01-student"
    leftovers = [
        killed.folder / ".run.json.99999.tmp",
        stage / ".metrics.jsonl.99999.tmp",
        stage / "checkpoints/.000000009.99999.tmp/state.safetensors",
        stage / ".artifact.99999.tmp/model.safetensors",
        stage / ".artifact.99999.tmp/.config.json.99999.tmp",
    ]
    for file in leftovers:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference
    assert not list(killed.folder.rglob(".*.tmp"))


def test_only_leftovers_are_swept(tmp_path):
    kept = [tmp_path / "a.tmp", tmp_path / ".a.tmp", tmp_path / ".hidden", tmp_path / "deep/.x.1.tmpl"]
    for file in [*kept, tmp_path / ".x.json.1.tmp", tmp_path / "deep/.y.22.tmp"]:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    sweep(tmp_path)
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(kept)


@pytest.mark.parametrize(
    "content", [b"", b'{"status": "do', b"\0" * 100, b"\xff\xfe"], ids=["empty", "cut", "zeros", "binary"]
)
@pytest.mark.parametrize("name", ["run.json", "stages/01-student/stage.json"])
def test_a_damaged_record_is_one_clear_line(name, content, killed, reference):
    """Which file, and what to do about it; and doing so helps."""
    file = killed.folder / name
    file.write_bytes(content)
    assert killed.go() == 2
    assert killed.said.count("\n") == 1
    assert killed.said.startswith(f"stillhouse: cannot read {file}: ")
    assert "delete it" in killed.said
    file.unlink()
    assert killed.go() == 0, killed.said
    assert killed.outcome() == reference


def test_a_record_damaged_after_the_stage_was_done(tmp_path, reference):
    job = Job(tmp_path, "kd")
    assert job.go() == 0, job.said
    file = job.folder / "stages/01-student/stage.json"
    cut(file)
    assert job.go() == 2 and f"cannot read {file}" in job.said
    file.unlink()
    assert job.go() == 0, job.said
    assert job.outcome() == reference


def test_resume_of_a_damaged_run(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*run\.json: .*delete it"):
        resume(tmp_path)


def test_checkpoints_of_a_stage_that_is_done_go(tmp_path, reference):
    """Killed after the record says done, before the checkpoints are removed."""
    job = Job(tmp_path, "kd")
    assert job.go(Trap("stillhouse.core.run:write_record", 2, "after")) == KILLED
    assert checkpoints(job)
    assert job.go() == 0, job.said
    assert job.outcome() == reference


# -- changed configurations -----------------------------------------------------------------------------------------


def done_again(folder, *, seed=0, fresh=False, **values):
    """Run ``three`` in ``folder``; the stages that were done rather than taken from disk."""
    before = {f.parent.name: f.stat().st_mtime_ns for f in folder.glob("stages/*/stage.json")}
    Run(folder, seed=seed, quiet=True, fresh=fresh).execute(Small.make(plot="three", **values))
    after = {f.parent.name: f.stat().st_mtime_ns for f in folder.glob("stages/*/stage.json")}
    assert sorted(after) == ["01-make", "02-train", "03-table"]
    return [name[3:] for name in sorted(after) if before.get(name) != after[name]]


ALL = ["make", "train", "table"]


def test_nothing_is_done_again_when_nothing_changed(tmp_path):
    assert done_again(tmp_path) == ALL
    assert done_again(tmp_path) == []
    assert done_again(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"width": 9}, ALL),
        ({"lr": 0.01}, ["train", "table"]),
        ({"alpha": 0.25}, ["train", "table"]),  # read late: by the objective, during training
        ({"table": "b"}, ["table"]),
        ({"steps": 99}, []),  # no stage reads it
        ({"pause": 0.5, "every": 2}, []),
        ({"seed": 1}, ALL),
        ({"fresh": True}, ALL),
    ],
)
def test_a_change_redoes_what_depends_on_it(change, expected, tmp_path):
    assert done_again(tmp_path) == ALL
    assert done_again(tmp_path, **change) == expected
    change.pop("fresh", None)
    assert done_again(tmp_path, **change) == []


def test_a_change_and_back(tmp_path):
    """The first result is gone, so it is made again, and is the same."""
    done_again(tmp_path)
    file = tmp_path / "stages/02-train/artifact/model.safetensors"
    first = load_file(file)
    done_again(tmp_path, lr=0.1)
    assert any(not torch.equal(first[name], tensor) for name, tensor in load_file(file).items())
    assert done_again(tmp_path) == ["train", "table"]
    assert all(torch.equal(first[name], tensor) for name, tensor in load_file(file).items())


def test_an_unfinished_stage_begins_anew_when_its_configuration_changed(tmp_path):
    changed = Job(tmp_path / "changed", "kd", {"lr": 0.01})
    assert changed.go() == 0, changed.said
    job = Job(tmp_path / "job", "kd")
    assert job.go(Trap("torch.optim:AdamW.step", 8)) == KILLED
    job.values = {"lr": 0.01}
    assert job.count("stillhouse.core.train:_Loop._one_step") == 12
    assert job.outcome() == changed.outcome()


def test_fresh_begins_an_unfinished_stage_anew(killed, reference):
    killed.fresh = True
    assert killed.count("stillhouse.core.train:_Loop._one_step") == 12
    assert killed.outcome() == reference


def test_another_seed_does_not_go_on_with_the_first(killed, tmp_path):
    other = Job(tmp_path / "other", "kd", seed=1)
    assert other.go() == 0
    killed.seed = 1
    assert killed.go() == 0, killed.said
    assert killed.outcome() == other.outcome()


def stages_of(*names):
    for name in names:
        yield Transform(name, lambda _, name=name: {"is": name})


def test_the_folder_of_a_stage_that_is_gone_goes(tmp_path):
    Run(tmp_path, quiet=True).execute(stages_of("a", "b", "c"))
    Run(tmp_path, quiet=True).execute(stages_of("a", "c"))
    assert sorted(folder.name for folder in (tmp_path / "stages").iterdir()) == ["01-a", "02-c"]
    assert json.loads((tmp_path / "run.json").read_text())["stages"] == ["01-a", "02-c"]


def test_stages_of_the_same_name_are_refused(tmp_path):
    with pytest.raises(RunError, match="two stages of this run are called 'a'"):
        Run(tmp_path, quiet=True).execute(stages_of("a", "a"))


def test_values_of_any_type_compare_equal_to_themselves(tmp_path, monkeypatch):
    """A field that holds what JSON knows only in another form (tuples in a dict) is not a change."""
    value = {"at": (1, 2), "where": tmp_path}
    runs = []

    def plot(self, run):
        yield Transform("make", lambda _: runs.append(self.table) or {"x": 1})

    monkeypatch.setitem(PLOTS, "three", plot)
    for _ in range(2):
        system = Small.make(plot="three")
        system.table = value
        Run(tmp_path, quiet=True).execute(system)
    assert runs == [value]


# -- several processes ----------------------------------------------------------------------------------------------


def test_a_run_in_use_is_refused_and_a_kill_frees_it(tmp_path, reference):
    job = Job(tmp_path, "kd")
    first = job.stopped_by(Trap("torch.optim:AdamW.step", 8))
    before = (job.folder / "run.json").read_bytes()
    assert job.go() == 2
    assert job.said == f"stillhouse: {job.folder} is in use by another process; wait for it or choose another output\n"
    assert (job.folder / "run.json").read_bytes() == before
    first.kill()
    first.join()
    assert job.count("stillhouse.core.train:_Loop._one_step") == 6
    assert job.outcome() == reference


def test_the_lock_is_free_after_an_error(tmp_path):
    def broken():
        yield Transform("a", lambda _: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path, quiet=True).execute(broken())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "ZeroDivisionError: division by zero")
    Run(tmp_path, quiet=True).execute(stages_of("a"))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"


def shared_jobs(home, **values):
    return [Job(home, "shared", values, cache=home / "cache", name=name) for name in ("one", "two")]


def taught(home):
    return (home / "taught.txt").read_text().split()


def same_teacher(*jobs):
    records = [json.loads((job.folder / "stages/01-teacher/stage.json").read_text()) for job in jobs]
    assert len({record["cache"] for record in records}) == 1
    assert len({record["fingerprint"] for record in records}) == 1
    return [record["reused"] for record in records]


def test_a_shared_stage_is_made_once(tmp_path):
    one, two = shared_jobs(tmp_path)
    assert one.go() == 0, one.said
    assert two.go() == 0, two.said
    assert taught(tmp_path) == ["one"]
    assert same_teacher(one, two) == [False, True]
    students = [job.folder / "stages/02-student/artifact/model.safetensors" for job in (one, two)]
    assert students[0].read_bytes() == students[1].read_bytes()
    assert one.count("stillhouse.core.train:_Loop._one_step") == 0  # and neither run does anything again
    assert taught(tmp_path) == ["one"]


def test_a_run_waits_for_a_shared_stage_that_another_makes(tmp_path):
    one, two = shared_jobs(tmp_path)
    first = one.stopped_by(Trap("torch.optim:AdamW.step", 8))
    second = two.start()
    while not (two.folder / "run.json").exists():
        time.sleep(0.005)
    second.join(0.3)
    assert second.exitcode is None and not (two.folder / "stages").exists()
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    second.join(60)
    assert (first.exitcode, second.exitcode) == (0, 0), one.said + two.said
    assert taught(tmp_path) == ["one"]
    assert same_teacher(one, two) == [False, True]


def test_a_shared_stage_that_was_killed_is_finished_by_another(tmp_path):
    whole = shared_jobs(tmp_path / "whole")[0]
    assert whole.go() == 0, whole.said
    one, two = shared_jobs(tmp_path)
    assert one.go(Trap("torch.optim:AdamW.step", 8)) == KILLED
    assert two.count("stillhouse.core.train:_Loop._one_step") == 6 + 3  # from step 7 of 12; then the student
    assert taught(tmp_path) == ["one", "two"]
    assert one.go() == 0, one.said
    assert same_teacher(one, two) == [True, False]
    files = [
        next((job.home / "cache").glob("teacher-*/artifact/model.safetensors")).read_bytes() for job in (whole, one)
    ]
    assert files[0] == files[1]


def test_a_shared_stage_does_not_depend_on_who_made_it(tmp_path):
    """Runs of other seeds share it, so their seeds must not be in it."""
    made = []
    for seed in (0, 1):
        job = Job(tmp_path / str(seed), "shared", seed=seed)
        assert job.go() == 0, job.said
        made.append(next((job.home / "cache").glob("teacher-*/artifact/model.safetensors")).read_bytes())
    assert made[0] == made[1]


def test_a_shared_stage_that_was_deleted_is_made_again(tmp_path):
    one, _ = shared_jobs(tmp_path)
    assert one.go() == 0, one.said
    shutil.rmtree(tmp_path / "cache")
    assert one.go() == 0, one.said
    assert taught(tmp_path) == ["one", "one"]


def test_a_cache_that_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot use the folder .*file"):
        Run(tmp_path / "run", quiet=True).execute([Transform("a", lambda _: 1, cache={"a": 1})])


def test_an_output_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot use the folder .*file"):
        Run(tmp_path / "file", quiet=True).execute(stages_of("a"))
