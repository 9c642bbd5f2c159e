"""Training that goes wrong: numbers that are not finite, full disks, taps that do not exist."""

import json
import math
import shutil
import subprocess
from collections import namedtuple

import _systems
import pytest
import torch
from _systems import CLASSES, FEATURES, Job, Mean, Trap, checkpoints, labelled, net
from safetensors.torch import load_file
from torch import nn

from stillhouse.base.errors import ModelError, RunError
from stillhouse.base.files import load_tree, whole_folder
from stillhouse.cli.main import main
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, sgd
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.objectives.adaptive import MomentumRamp
from stillhouse.objectives.features import FeatureMSE
from stillhouse.objectives.logits import CrossEntropy


def train(folder, player, **options):
    options = {"source": Batches(labelled(), 8), "steps": 6, "log_every": 2, **options}
    return Run(folder, quiet=True).execute([Train("student", player, **options)])


def metrics(folder):
    return [json.loads(line) for line in (folder / "stages/01-student/metrics.jsonl").read_text().splitlines()]


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- numbers that are not finite ------------------------------------------------------------------------------------


def finite(state) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_the_term_that_became_nan_is_named(tmp_path):
    """The guilty term of two, the step, the checkpoint that is kept; and that one is sound."""
    job = Job(tmp_path, "nan", {"bad_step": 7})
    assert job.go() == 2
    assert job.said.count("\n") == 1
    assert "stage 'student', step 8: term 'wild' of player 'student' became nan" in job.said
    assert "the checkpoint of step 6 is kept" in job.said
    assert "tame" not in job.said
    [kept] = checkpoints(job)
    state = load_tree(kept)
    assert kept.name == "000000006" and finite(state["models"][0])
    record = json.loads((job.folder / "run.json").read_text())
    assert record["status"] == "failed" and "'wild'" in record["error"]


def test_the_kept_checkpoint_is_gone_on_with_once_the_cause_is_gone(tmp_path):
    """A NaN that came from outside (a broken batch, say) costs no step that was saved."""
    job = Job(tmp_path / "broken", "nan", {"bad_step": 7})
    assert job.go() == 2
    assert job.go() == 0  # the counter of steps starts again with the process, so step 7 of this one is never reached
    sound = Job(tmp_path / "sound", "nan", {"bad_step": -1})
    assert sound.go() == 0
    weights = [load_file(one.folder / "stages/01-student/artifact/model.safetensors") for one in (job, sound)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nan_before_the_first_checkpoint(tmp_path):
    job = Job(tmp_path, "nan", {"bad_step": 0})
    assert job.go() == 2
    assert "step 1: term 'wild'" in job.said and "no checkpoint was made yet" in job.said
    assert not checkpoints(job)


def test_a_gradient_that_goes_bad_never_reaches_a_checkpoint(tmp_path):
    """Every term is finite in the step before the checkpoint; only the weights show what happened."""
    job = Job(tmp_path, "nan", {"bad_step": 5, "alpha": -1.0})
    assert job.go() == 2
    assert "step 6: the weights '0.weight' of Sequential became nan or infinite" in job.said
    assert "the checkpoint of step 3 is kept" in job.said
    [kept] = checkpoints(job)
    assert finite(load_tree(kept)["models"][0])


def test_a_gradient_that_goes_bad_in_the_last_step_makes_no_artifact(tmp_path):
    job = Job(tmp_path, "nan", {"bad_step": 11, "alpha": -1.0})
    assert job.go() == 2
    assert "step 12: the weights '0.weight'" in job.said
    assert not (job.folder / "stages/01-student/artifact").exists()


def test_the_first_of_several_players_is_named(tmp_path):
    """The second player goes bad, and takes the first one with it."""
    torch.manual_seed(0)
    one, two = Observed(net(FEATURES, 8, CLASSES), name="one"), Observed(net(FEATURES, 8, CLASSES), name="two")
    step = -1

    def spoil(out, batch):
        nonlocal step
        step += 1
        return out.sum(1) * (math.inf if step == 2 else 1.0)

    follows = Mean(lambda a, b, batch: (a - b).square(), a=one.output(), b=two.output().detach(), name="follows")
    players = [
        Player("one", one, follows, optimizer=sgd(0.1)),
        Player("two", two, Mean(spoil, out=two.output(), name="spoils"), optimizer=sgd(0.1)),
    ]
    with pytest.raises(RunError) as caught:
        train(tmp_path, players)
    assert "step 3: term 'spoils' of player 'two' became" in one_line(caught)


def test_a_weight_that_is_not_finite_is_found_too(tmp_path):
    student = Observed(net(FEATURES, 8, CLASSES))
    objective = linear(math.nan, math.nan) * CrossEntropy(student.output())
    with pytest.raises(RunError) as caught:
        train(tmp_path, Player("student", student, objective))
    assert "step 1: term 'CrossEntropy'" in one_line(caught) and "weight nan" in one_line(caught)


def test_nan_on_the_command_line(tmp_path, capsys):
    system = shutil.copy(_systems.__file__, str(tmp_path / "my_system.py"))
    words = ["run", system, "plot=nan", "bad_step=4", f"output={tmp_path / 'run'}", "trackers=", "-q"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("stillhouse: ") and "'wild'" in line and "step 5" in line and "step 3 is kept" in line


# -- what is logged -------------------------------------------------------------------------------------------------


def test_a_term_may_be_left_out_of_some_steps(tmp_path):
    """As a term does whose weight is scheduled from zero: it is logged with its mean where it was computed."""
    student = Observed(net(FEATURES, 8, CLASSES))

    class Sometimes(Mean):
        def evaluate(self, turn, batch, progress):
            values = super().evaluate(turn, batch, progress)
            if progress.step % 2:
                values += [type(values[0])("second", values[0].value, 0.5)]
            return values

    term = Sometimes(lambda out, batch: out.square(), out=student.output(), name="first")
    train(tmp_path, Player("student", student, term), shares_every=0)
    terms = [line["terms"] for line in metrics(tmp_path)]
    assert len(terms) == 3
    for one in terms:
        assert one["first"]["weight"] == 1.0 and one["second"]["weight"] == 0.25


# -- what a stage does before its first step ------------------------------------------------------------------------


def test_sizing_a_projection_leaves_no_trace(tmp_path):
    """The first batch is drawn to find widths: batch statistics and adaptive schedules must not see it twice."""
    torch.manual_seed(0)
    teacher, student = Observed(net(FEATURES, 12, CLASSES), frozen=True), Observed(net(FEATURES, 8, CLASSES, norm=True))
    ramp = MomentumRamp(0.2, 0.9)
    objective = ramp * FeatureMSE(student.tap("0"), teacher.tap("0"), project="linear") + CrossEntropy(student.output())
    counted = []
    source = Batches(labelled(), 8, collate=lambda rows: counted.append(1) or torch.utils.data.default_collate(rows))
    train(tmp_path, Player("student", student, objective), source=source, steps=1)
    assert int(student.module[1].num_batches_tracked) == 1
    assert float(ramp.pending[1]) == 1
    assert len(counted) == 2  # once for the widths, once for the step


def test_players_without_a_source_share_the_stage_s(tmp_path):
    """A second turn in a step gets a fresh batch of the one stream, whatever kind of stream it is."""
    seen = {"one": [], "two": []}

    def watch(name):
        model = Observed(net(FEATURES, 4, 1), name=name)

        def look(out, batch):
            seen[name].append(int(batch["id"][0]))
            return out

        return Player(name, model, Mean(look, out=model.output()), repeats=2 if name == "two" else 1)

    batches = [{"inputs": torch.randn(2, FEATURES), "id": torch.full((2,), i)} for i in range(20)]
    train(tmp_path, [watch("one"), watch("two")], source=batches, steps=3, shares_every=0)
    assert seen == {"one": [0, 2, 4], "two": [0, 1, 2, 3, 4, 5]}


def test_a_source_that_yields_only_once(tmp_path):
    student = Observed(net(FEATURES, 8, CLASSES))
    batches = (torch.randn(4, FEATURES) for _ in range(3))
    with pytest.raises(ValueError, match="cannot be read again"):
        train(tmp_path, Player("student", student, Mean(lambda out, batch: out, out=student.output())), source=batches)


# -- full disks -----------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    student = Observed(nn.Linear(FEATURES, 40_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RunError) as caught:
        train(tmp_path, Player("student", student, CrossEntropy(student.output())))
    message = one_line(caught)
    assert "stage 'student' needs about 9 MiB" in message and "has 1 MiB free" in message
    assert str(tmp_path) in message and "free some space or choose another output" in message
    assert metrics(tmp_path) == [] if (tmp_path / "stages/01-student/metrics.jsonl").exists() else True


def test_a_file_that_grows_too_large(tmp_path):
    """RLIMIT_FSIZE in the middle of a run: one line, the checkpoint before is whole, and the run ends as if nothing."""
    values = {"width": 4000}
    reference = Job(tmp_path / "reference", "kd", values)
    assert reference.go() == 0, reference.said
    job = Job(tmp_path / "job", "kd", values)
    assert job.go(Trap("torch.optim:AdamW.step", 5)) < 0
    before = {file: file.read_bytes() for folder in checkpoints(job) for file in folder.iterdir()}
    assert before
    job.largest_file = 100_000
    assert job.go() == 2
    assert job.said.count("\n") == 1 and job.said.startswith(f"stillhouse: could not write {job.folder}")
    assert "File too large" in job.said and "free some space and resume the run" in job.said
    assert {file: file.read_bytes() for folder in checkpoints(job) for file in folder.iterdir()} == before
    assert json.loads((job.folder / "run.json").read_text())["status"] == "failed"
    job.largest_file = None
    assert job.go() == 0, job.said
    assert job.outcome() == reference.outcome()


def test_a_full_disk_in_a_library_s_own_words(tmp_path):
    """The Rust in tokenizers and safetensors raises errors of its own; what is no error of the disk stays as it is."""
    said = r"could not write .*model: No space left on device \(os error 28\)"
    with pytest.raises(RunError, match=said), whole_folder(tmp_path / "model"):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ValueError, match="mine"), whole_folder(tmp_path / "model"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs more rights than these")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


PLACES = [  # where the disk is full: at which call it fills up, and what cannot be written then
    ("stillhouse.base.files:save_tree", 2, "checkpoints/000000006"),
    ("stillhouse.base.monitor:MetricsFile.append", 3, ""),
    ("stillhouse.core.stage:Context.save", 1, "artifact"),
    ("stillhouse.core.run:write_record", 2, "stage.json"),
]


@pytest.mark.parametrize(("target", "at", "named"), PLACES)
def test_a_full_disk(target, at, named, small_disk, tmp_path):
    """Whatever is being written when the disk fills up: one line, nothing lost, and the end is the same."""
    reference = Job(tmp_path / "reference", "kd")
    assert reference.go() == 0, reference.said
    job = Job(tmp_path, "kd", name="disk/run")
    ballast = small_disk / "ballast"
    assert job.go(Trap(target, at, fill=str(ballast))) == 2
    assert job.said.count("\n") == 1 and job.said.startswith("stillhouse: could not write ")
    assert "No space left on device" in job.said and "free some space and resume the run" in job.said
    assert named in job.said
    for kept in checkpoints(job):
        assert load_tree(kept)["step"] == int(kept.name)
    ballast.unlink()
    assert job.go() == 0, job.said
    assert job.outcome() == reference.outcome()


def test_a_disk_that_is_full_from_the_beginning(small_disk, tmp_path):
    job = Job(tmp_path, "kd", name="disk/run")
    assert job.go(Trap("filelock:FileLock.acquire", 1, fill=str(small_disk / "ballast"))) == 2
    assert job.said.count("\n") == 1 and "No space left on device" in job.said


# -- taps that do not exist -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs):
        return inputs


def test_a_tap_that_does_not_exist_names_the_nearest_paths():
    model = Observed(Encoder(), name="student")
    with pytest.raises(ModelError) as caught:
        model.tap("layer.1")
    assert one_line(caught).startswith("student has no sub-module 'layer.1'; did you mean 'layers.1'")


def test_a_tap_that_is_like_nothing_lists_what_there_is():
    with pytest.raises(ModelError) as caught:
        Observed(Encoder(), name="student").tap("zzz")
    assert one_line(caught) == (
        "student has no sub-module 'zzz'; known: embedding, layers, layers.0, layers.1, layers.2"
    )


def test_a_parameter_that_does_not_exist():
    with pytest.raises(ModelError) as caught:
        Observed(Encoder(), name="student").parameter("embeding.weight")
    assert "no parameter 'embeding.weight'; did you mean 'embedding.weight'" in one_line(caught)


def test_a_tap_that_the_forward_never_reaches(tmp_path):
    model = Observed(Encoder(), name="student")
    player = Player("student", model, Mean(lambda out, batch: out, out=model.tap("layers.2")))
    with pytest.raises(ModelError, match=r"the forward did not call 'layers\.2'"):
        train(tmp_path, player, source=[torch.ones(2, 4)])
