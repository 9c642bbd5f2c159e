"""A run killed at any instant and gone on with ends as if it had never stopped, bit for bit."""

import json
import os
import random
import signal
import socket

import pytest
from _systems import Job, Trap, checkpoints, lines, random_points

PLOTS = ("kd", "players", "mutual", "adaptive", "patience", "pipeline")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """``plot -> (outcome of an uninterrupted run, how many lines of Stillhouse it executes)``; made when asked for."""
    known = {}

    def make(plot):
        if plot not in known:
            job = Job(tmp_path_factory.mktemp(plot), plot)
            total = job.count("line")
            known[plot] = job.outcome(), total
        return known[plot]

    return make


def go_on(job):
    """Resume after the last kill; the run must end well."""
    assert job.go() == 0, job.said


def same(job, reference):
    """The outcome is the uninterrupted one; on failure say where it differs, not what the bytes are."""
    found, expected = job.outcome(), reference(job.plot)[0]
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def weights_same(job, reference):
    """As `same`, where other things may differ."""
    found, expected = job.outcome(), reference(job.plot)[0]
    files = [name for name in expected if name.endswith(".safetensors")]
    assert files
    assert [name for name in files if found[name] != expected[name]] == []


@pytest.mark.parametrize("plot", PLOTS)
def test_an_uninterrupted_run_repeats_itself(plot, reference, tmp_path):
    job = Job(tmp_path, plot)
    go_on(job)
    same(job, reference)


def test_the_comparison_sees_another_seed(reference, tmp_path):
    job = Job(tmp_path, "kd", seed=1)
    go_on(job)
    found, expected = job.outcome(), reference("kd")[0]
    assert found["01-student/model.safetensors"] != expected["01-student/model.safetensors"]
    assert found["01-student/metrics"] != expected["01-student/metrics"]


# -- kills at any line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_lines(plot, seed, reference, tmp_path):
    """Killed up to three times in one run; the first kill always falls inside it."""
    total = reference(plot)[1]
    job = Job(tmp_path, plot)
    points = random_points(1000 * PLOTS.index(plot) + seed, int(total * 0.98), 3)
    assert job.go(Trap("line", next(points))) == KILLED, job.said
    ended = False
    for point in points:
        if not ended:
            code = job.go(Trap("line", point))
            assert code in (KILLED, 0), job.said
            ended = code == 0
    go_on(job)
    same(job, reference)


# -- kills around operations on files -------------------------------------------------------------------------------

OPERATIONS = ("os:fsync", "os:replace", "os:unlink", "os:rmdir", "os:mkdir")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("plot", ["kd", "pipeline"])
def test_killed_around_file_operations(plot, operation, reference, tmp_path):
    """Kills before and after calls that change the disk, spread over the whole run, each in a run of its own."""
    total = Job(tmp_path / "count", plot).count(operation)
    assert total >= 3
    chosen = sorted(random.Random(operation).sample(range(1, total + 1), 3 if plot == "kd" else 2))
    for at in chosen:
        job = Job(tmp_path / str(at), plot)
        assert job.go(Trap(operation, at, "before" if at % 2 else "after")) == KILLED, job.said
        go_on(job)
        same(job, reference)


def test_killed_between_stages(reference, tmp_path):
    """Around every writing of a stage's record: begun, done, and between one stage and the next."""
    target = "stillhouse.core.run:write_record"
    total = Job(tmp_path / "count", "pipeline").count(target)
    assert total == 8
    for at in range(1, total + 1):
        job = Job(tmp_path / str(at), "pipeline")
        assert job.go(Trap(target, at, "before" if at % 3 else "after")) == KILLED, job.said
        go_on(job)
        same(job, reference)


def test_killed_in_every_stretch_of_one_run(reference, tmp_path):
    """Killed once per checkpoint, in one run: each resume gets a little further."""
    job = Job(tmp_path, "kd")
    reached = []
    for _ in range(3):
        assert job.go(Trap("torch.optim:AdamW.step", 5)) == KILLED, job.said
        reached.append(int(checkpoints(job)[-1].name))
    assert reached == [3, 6, 9]
    go_on(job)
    same(job, reference)


@pytest.mark.parametrize("plot", ["players", "mutual", "adaptive"])
def test_killed_in_the_middle_of_a_step(plot, reference, tmp_path):
    """Some players have stepped and some have not."""
    job = Job(tmp_path, plot)
    for _ in range(3):
        assert job.go(Trap("torch.optim:AdamW.step", 8, "after")) in (KILLED, 0), job.said
    go_on(job)
    same(job, reference)


# -- kills from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", ["kd", "pipeline"])
def test_killed_from_outside(plot, reference, tmp_path):
    """A real clock decides; wherever it strikes, the outcome is the same. (``pause`` changes no number.)"""
    job = Job(tmp_path, plot, {"pause": 0.01})
    generator = random.Random(plot)
    for _ in range(6):
        process = job.start()
        begun = len(lines_written(job))
        while process.exitcode is None and len(lines_written(job)) == begun:
            process.join(0.001)
        process.join(generator.random() * 0.15)
        process.kill()
        process.join()
        assert process.exitcode in (KILLED, 0), job.said
        if process.exitcode == 0:
            break
    go_on(job)
    weights_same(job, reference)  # the pause is a field, so the fingerprints are others


def lines_written(job):
    return [line for file in job.folder.glob("stages/*/*.jsonl") for line in file.read_bytes().splitlines()]


# -- nothing twice, nothing lost ------------------------------------------------------------------------------------


def test_no_step_is_logged_twice_or_missing(reference, tmp_path):
    job = Job(tmp_path, "kd")
    for point in random_points(7, reference("kd")[1] // 2, 4):
        job.go(Trap("line", point))
    go_on(job)
    logged = [line["step"] for line in lines(job.folder / "stages/01-student/metrics.jsonl") if line["kind"] == "train"]
    assert logged == [3, 4, 6, 8, 9, 12]  # every checkpoint and every fourth step


def test_nothing_is_asked_twice_and_nothing_is_lost(reference, tmp_path):
    """A request whose record had reached the disk before a kill is never asked again."""
    job = Job(tmp_path, "pipeline")
    asked, journal = job.folder / "asked.txt", job.folder / "stages/02-answers/records.jsonl"
    writes = "stillhouse.base.monitor:MetricsFile.append"
    kept, before, kills = [], 0, 0
    while True:
        code = job.go(Trap(writes, 12 if not kills else 3, "after" if kills % 2 else "before"))
        new = [tuple(json.loads(line)) for line in asked.read_text().splitlines()][before:]
        assert not set(new) & set(kept)
        before += len(new)
        kills += code == KILLED
        known = {line["key"]: line["record"] for line in lines(journal)}
        kept = [tuple(json.loads(line)) for line in asked.read_text().splitlines()][: len(known)]
        if code == 0 or len(known) == 10:
            break
    assert kills >= 3
    go_on(job)
    same(job, reference)


def test_a_generated_field_that_the_first_record_lacks_is_not_lost(tmp_path):
    import pyarrow.parquet

    from stillhouse.core.run import Run
    from stillhouse.core.stage import Generate

    written = {"a": {"text": "x"}, "b": None, "c": {"text": "y", "score": 2}}
    run = Run(tmp_path, quiet=True)
    artifact = run.execute([Generate("data", {key: key for key in written}, written.get)])["data"]
    assert pyarrow.parquet.read_table(artifact.data_file()).to_pylist() == [
        {"key": "a", "text": "x", "score": None},
        {"key": "c", "text": "y", "score": 2},
    ]


# -- asked to stop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(number, reference, tmp_path):
    """The step is finished and saved, the message says how to go on, and nothing depends on the stop."""
    job = Job(tmp_path, "kd")
    assert job.go(Trap("torch.optim:AdamW.step", 7, signal=number)) == 2
    assert job.said == f"stillhouse: stopped at step 7 of 12; go on: stillhouse resume {job.folder}\n"
    assert [int(folder.name) for folder in checkpoints(job)] == [7]
    record = json.loads((job.folder / "run.json").read_text())
    assert (record["status"], record["error"]) == ("stopped", None)
    go_on(job)
    weights_same(job, reference)
    steps = [line["step"] for line in lines(job.folder / "stages/01-student/metrics.jsonl") if line["kind"] == "train"]
    assert steps == [3, 4, 6, 7, 8, 9, 12]


def test_stopped_in_the_last_step(reference, tmp_path):
    job = Job(tmp_path, "kd")
    assert job.go(Trap("torch.optim:AdamW.step", 12, signal=signal.SIGTERM)) == 2
    go_on(job)
    same(job, reference)


def test_stopped_twice_is_stopped_at_once(tmp_path):
    """A second Ctrl-C does not wait for the step."""
    job = Job(tmp_path, "kd", {"pause": 0.001})
    assert job.go(Trap("torch.optim:AdamW.step", 7, signal=signal.SIGINT, times=2)) == 1
    assert "KeyboardInterrupt" in job.said
    assert [int(folder.name) for folder in checkpoints(job)] == [6]
    assert json.loads((job.folder / "run.json").read_text())["status"] == "stopped"
    go_on(job)


def test_stop_and_resume_on_the_command_line(reference, tmp_path):
    """What the message says to type goes on with the run, report included."""
    import _systems

    system = _systems.__file__
    words = ["run", system, "plot=kd", "steps=12", f"output={tmp_path / 'run'}", "trackers=", "-q"]
    job = Job(tmp_path, "kd", command=words)
    assert job.go(Trap("torch.optim:AdamW.step", 7, signal=signal.SIGTERM)) == 2
    said = [line for line in job.said.splitlines() if line.startswith("stillhouse:")]
    assert said == [f"stillhouse: stopped at step 7 of 12; go on: stillhouse resume {job.folder}"]
    job.command = [*said[0].partition("go on: stillhouse ")[2].split(), "-q"]
    assert job.go() == 0, job.said
    weights_same(job, reference)
    assert (job.folder / "report.html").exists()
    assert json.loads((job.folder / "run.json").read_text())["status"] == "done"


def test_a_signal_from_outside(reference, tmp_path):
    """Sent by another process while the child trains, as a scheduler does."""
    job = Job(tmp_path, "kd")
    process = job.stopped_by(Trap("torch.optim:AdamW.step", 8))
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 2
    assert "stopped at step 8 of 12; go on: stillhouse resume" in job.said
    go_on(job)
    weights_same(job, reference)


# -- two processes of one run ---------------------------------------------------------------------------------------


def in_two_processes(home, plot, trap=None):
    """Run both to their end, the second one without the trap; the first one's job, and the exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [Job(home, plot, place=(rank, port)) for rank in range(2)]
    processes = [job.start(trap if not job.place[0] else None) for job in jobs]
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return jobs[0], codes


def test_two_processes_stop_together(tmp_path):
    """A signal that only one of them got, in a step that the other may have left already."""
    whole, codes = in_two_processes(tmp_path / "whole", "kd")
    assert codes == [0, 0], whole.said
    job, codes = in_two_processes(tmp_path / "job", "kd", Trap("torch.optim:AdamW.step", 6, signal=signal.SIGTERM))
    assert codes == [2, 2], job.said
    assert "stopped at step 8 of 12; go on: stillhouse resume" in job.said  # they look when they log
    job, codes = in_two_processes(tmp_path / "job", "kd")
    assert codes == [0, 0], job.said
    found, expected = job.outcome(), whole.outcome()
    assert [name for name in expected if name.endswith(".safetensors") and found[name] != expected[name]] == []


def test_two_processes_ask_once(tmp_path):
    job, codes = in_two_processes(tmp_path, "pipeline")
    assert codes == [0, 0], job.said
    assert len((job.folder / "asked.txt").read_text().splitlines()) == 10
