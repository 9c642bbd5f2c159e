"""The command line as a user types it, wrongly: exit code 2, one line that helps, no traceback."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from stillhouse.cli.main import main
from stillhouse.models import new_causal_lm, train_bpe

WORDS = ["still", "house", "malt", "barley", "copper", "spirit", "cask", "water", "yeast", "grain", "mash", "peat"]
SMALL = ["student=scale:0.5", "window=16", "batch_size=2", "steps=2", "eval_windows=2", "trackers="]


def prose(words: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def write_model(folder, text, vocab_size):
    tokenizer = train_bpe([text], vocab_size=vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_causal_lm(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A teacher, a model with another tokenizer, and teachers that are broken in one way each."""
    home = tmp_path_factory.mktemp("models")
    write_model(home / "teacher", prose(400), 300)
    write_model(home / "stranger", prose(400)[::-1], 290)

    def variant(name):
        return shutil.copytree(home / "teacher", home / name)

    (variant("no-weights") / "model.safetensors").unlink()
    pickled = variant("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    remote = variant("remote") / "config.json"
    about = json.loads(remote.read_text())
    remote.write_text(json.dumps({**about, "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}))
    weights = variant("cut-short") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    return home


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Text, and files that are no text."""
    home = tmp_path_factory.mktemp("data")
    (home / "good.txt").write_text("\f".join(prose(100, seed) for seed in range(30)))
    (home / "empty.txt").touch()
    (home / "short.txt").write_text("malt and water")
    (home / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (home / "latin.txt").write_bytes("Fässer, groß und klein. ".encode("latin1") * 100)
    (home / "table.csv").write_text("a,b\n1,2\n")
    lines = [json.dumps({"text": prose(100, seed)}) for seed in range(30)]
    lines[3] = '{"text": "half'
    (home / "broken.jsonl").write_text("\n".join(lines))
    return home


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """Type words; the one line that came back."""

    def type_in(*words, code: int = 2) -> str:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return only_line(err, out)

    return type_in


def only_line(err: str, out: str) -> str:
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("stillhouse: ") and "Traceback" not in err and "unexpected" not in err
    return err


# -- names and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["run", "kdd"], ["there is no system 'kdd'", "did you mean 'kd'"]),
        (["run", "zzzzzz"], ["there is no system 'zzzzzz'", "known: ", "agent-memory"]),
        (["show", "tiad"], ["no system 'tiad'", "did you mean 'taid'"]),
        (["config", "tiad"], ["no system 'tiad'", "did you mean 'taid'"]),
        (["run", "kd", "temprature=3"], ["kd has no field 'temprature'", "did you mean 'temperature'"]),
        (["run", "kd", "outptu=x"], ["no field 'outptu'", "'output'"]),
        (["run", "kd", "temperature=-1"], ["temperature='-1' is not allowed", "float (> 0)"]),
        (["run", "kd", "temperature=warm"], ["temperature='warm' is not allowed", "valid number"]),
        (["run", "kd", "temperature=nan"], ["temperature='nan' is not allowed"]),
        (["run", "kd", "keep=bset"], ["keep='bset' is not allowed", "'last' | 'best'"]),
        (["run", "kd", "devices=0"], ["devices='0' is not allowed", "int (>= 1)"]),
        (["run", "kd", "devices=two"], ["devices='two' is not allowed", "valid integer"]),
        (["run", "kd", "checkpoint_minutes=0"], ["checkpoint_minutes='0' is not allowed", "float (> 0)"]),
        (["run", "kd", "temperature"], ["'temperature' is not of the form field=value"]),
        (["run", "kd", "=3"], ["'=3' is not of the form field=value"]),
        (["run"], ["which system?"]),
        (["run", "temperature=3"], ["which system?"]),
        (["run", "kd", "--tempreature", "3"], ["No such option"]),
        (["rnu"], ["No such command 'rnu'"]),
        (["run", "no_such_file.py"], ["there is no file no_such_file.py"]),
        (["launch", "--devices", "2", "show", "kd"], ["launch starts `run` or `resume`", "show"]),
        (["launch", "--nodes", "2", "run", "kd"], ["--address HOST:PORT"]),
        (["check", "sft"], ["sft has no claim to check"]),
        (["check", "kdd"], ["there is no system 'kdd'"]),
        (["systems", "--domain"], ["--domain"]),
    ],
)
def test_names_and_values(words, needles, refused):
    line = refused(*words)
    for needle in needles:
        assert needle in line


@pytest.mark.parametrize(
    ("word", "needles"),
    [
        ("devices=2", ["devices=2 needs 2 processes", "stillhouse launch --devices 2"]),
        ("trackers=tensorbord", ["trackers: there is no 'tensorbord'", "did you mean 'tensorboard'?"]),
        ("accelerator=gpx", ["cannot start the engine", "gpx"]),
        ("precision=8", ["precision='8' is not allowed", "'bf16-mixed'"]),
        ("strategy=dpp", ["strategy='dpp' is not allowed", "'ddp' | 'fsdp2'"]),
    ],
)
def test_options_of_the_run(word, needles, refused):
    line = refused("run", "sft", "output=x", word)
    for needle in needles:
        assert needle in line


def test_an_output_that_is_a_file(refused, tmp_path):
    (tmp_path / "x").touch()
    assert "cannot use the folder x" in refused("run", "sft", "output=x")


def test_a_python_file_without_a_system(refused, tmp_path):
    (tmp_path / "nothing_here.py").write_text("x = 1\n")
    assert "must define exactly one System" in refused("run", "nothing_here.py")


# -- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        (b"- kd\n- 0.1\n", ["holds a list, not a mapping", "stillhouse config NAME"]),
        (b"just words\n", ["holds a str, not a mapping"]),
        (b"", ["holds nothing, not a mapping"]),
        (b"system: kd\nlr: 0.1\nwindow: 64\nlr: 0.2\n", ["line 4", "duplicate key", '"lr"', "keep one"]),
        (b"system: kd\nlr: !!python/object/apply:os.system [true]\n", ["line 2", "tags", "not allowed"]),
        (b"system: !mine kd\n", ["line 1", "tags (!mine) are not allowed"]),
        (b"system: kd\nlr: [1, 2\nwindow: }\n", ["line 3", "not valid YAML"]),
        (b"system: kd\n\tlr: 1\n", ["line 2", "not valid YAML"]),
        (b"system: kd\n---\nsystem: sft\n", ["not valid YAML", "another document"]),
        (b"system: \x01\n", ["not valid YAML"]),
        ("system: kd\n# für\n".encode("latin1"), ["not UTF-8 text (byte 14)"]),
        (b"system: kd\n1: 2\n", ["the field name 1 is not text"]),
        (b": 2\n", ["the field name None is not text"]),
        (b"lr: 0.1\n", ["which system?"]),
        (b"system: 5\n", ["system=5 is not text"]),
        (b"system: kd\noutput: [a]\n", ["output=['a'] is not text"]),
        (b"system: kdd\n", ["there is no system 'kdd'"]),
        (b"system: kd\ntemprature: 2.0\n", ["kd has no field 'temprature'"]),
        (b"system: kd\nlr: fast\n", ["lr='fast' is not allowed"]),
        (b"system: kd\nlr:\n", ["lr=None is not allowed"]),
        (b"system: kd\nlr: {a: 1}\n", ["lr={'a': 1} is not allowed"]),
        (b"system: kd\nseed: 2024-01-01\n", ["seed=", "is not allowed"]),
    ],
)
def test_recipes(content, needles, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    line = refused("run", "-c", "recipe.yaml")
    for needle in needles:
        assert needle in line


def test_a_recipe_that_is_not_there(refused, tmp_path):
    assert "cannot read the recipe nope.yaml: No such file" in refused("run", "-c", "nope.yaml")
    assert "cannot read the recipe .: Is a directory" in refused("run", "-c", ".")


def test_a_recipe_for_another_system(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("system: kd\n")
    assert "recipe.yaml is a recipe for 'kd', not for 'sft'" in refused("run", "sft", "-c", "recipe.yaml")


# -- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "needles"),
    [
        ("gold.txt", ["gold.txt: no such file", "did you mean 'good.txt'?"]),
        ("empty.txt", ["empty.txt: the file is empty"]),
        ("binary.txt", ["binary.txt: a binary file"]),
        ("latin.txt", ["latin.txt", "not UTF-8", "iconv"]),
        ("table.csv", ["table.csv: unsupported ending '.csv'", ".jsonl"]),
        ("broken.jsonl", ["broken.jsonl:4: not JSON", "on_bad_record=skip"]),
        ("short.txt", ["short.txt: too little text", "window of 16"]),
    ],
)
def test_data(name, needles, refused, data, models):
    line = refused("run", "sft", "output=x", "-q", f"teacher={models / 'teacher'}", f"data={data / name}", *SMALL)
    for needle in needles:
        assert needle in line
    assert json.loads(Path("x/run.json").read_text())["status"] == "failed"


def test_a_broken_record_can_be_skipped(data, models, capsys):
    words = ["run", "sft", "output=x", f"teacher={models / 'teacher'}", f"data={data / 'broken.jsonl'}", *SMALL]
    main([*words, "on_bad_record=skip"])
    out, err = capsys.readouterr()
    assert "skipped 1 bad record(s), such as" in err and "broken.jsonl:4" in err
    assert "report  x/report.html" in out
    assert json.loads(Path("x/run.json").read_text())["status"] == "done"


def test_the_demo_s_teacher_teaches_the_demo_s_text_only(refused, data):
    assert "pass your own teacher" in refused("run", "sft", "output=x", f"data={data / 'good.txt'}")


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "needles"),
    [
        ("teachers", ["teachers: no such directory", "did you mean 'teacher'?"]),
        ("no-weights", ["no-weights: no weights", "*.safetensors"]),
        ("pickled", ["pickled: only pickled weights (pytorch_model.bin)", "can run code"]),
        ("remote", ["remote", "needs Python code that comes with the model", "trust_remote_code=true"]),
        ("cut-short", ["cut-short/model.safetensors: damaged or cut short"]),
    ],
)
def test_models(name, needles, refused, data, models):
    line = refused("run", "sft", "output=x", "-q", f"teacher={models / name}", f"data={data / 'good.txt'}", *SMALL)
    for needle in needles:
        assert needle in line


@pytest.mark.parametrize(
    ("student", "needles"),
    [
        ("scale:2", ["scale 2.0", "at most 1"]),
        ("scale:half", ["'scale:half'", "fraction"]),
        ("layrs=1", ["'layrs=1' is not a size", "did you mean 'layers'?"]),
    ],
)
def test_students(student, needles, refused, data, models):
    words = ["output=x", "-q", f"teacher={models / 'teacher'}", f"data={data / 'good.txt'}", *SMALL]
    line = refused("run", "kd", *words, f"student={student}")
    for needle in needles:
        assert needle in line


def test_teacher_and_student_with_different_tokenizers(refused, data, models):
    words = ["output=x", "-q", f"teacher={models / 'teacher'}", f"data={data / 'good.txt'}", *SMALL]
    line = refused("run", "kd", *words, f"student={models / 'stranger'}")
    assert "teacher and student have different tokenizers" in line and "use a student with the teacher's" in line


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["resume", "report"])
def test_what_is_no_run(command, refused, tmp_path):
    assert "nope is not a run: it has no run.json" in refused(command, "nope")
    (tmp_path / "empty").mkdir()
    assert "empty is not a run" in refused(command, "empty")


@pytest.mark.parametrize("command", ["resume", "report"])
def test_a_damaged_run(command, refused, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    assert "cannot read broken/run.json" in refused(command, "broken")


def test_a_run_that_no_command_started(refused, tmp_path):
    from stillhouse.core.run import Run

    Run(tmp_path / "mine", quiet=True).execute([])
    assert "was not started from a named system" in refused("resume", "mine")


def test_a_damaged_run_does_not_hide_the_others(tmp_path, capsys):
    from stillhouse.core.run import Run

    Run(tmp_path / "runs/fine", quiet=True).execute([])
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/run.json").write_text("{")
    main(["runs"])
    out, err = capsys.readouterr()
    assert err == ""
    found = [line.split()[:3] for line in out.splitlines()[1:]]
    assert found == [["runs/broken", "–", "damaged"], ["runs/fine", "–", "done"]]


# -- as a process of its own ----------------------------------------------------------------------------------------


def shell(*words):
    # The library's progress bars must be kept off the error by the command itself.
    environment = {name: value for name, value in os.environ.items() if "PROGRESS_BARS" not in name}
    command = [sys.executable, "-m", "stillhouse.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_process_unknown_system():
    done = shell("run", "kdd")
    assert done.returncode == 2
    assert "there is no system 'kdd'; did you mean 'kd'" in only_line(done.stderr, done.stdout)


def test_process_too_little_text(data, models):
    """The models and the data have been loaded by then, and nothing was said about it."""
    done = shell("run", "sft", "output=x", f"teacher={models / 'teacher'}", f"data={data / 'short.txt'}", *SMALL)
    assert done.returncode == 2
    assert "too little text" in only_line(done.stderr, done.stdout)


def test_process_devices_without_a_launcher():
    done = shell("run", "sft", "output=x", "devices=2")
    assert done.returncode == 2
    assert "stillhouse launch --devices 2" in only_line(done.stderr, done.stdout)


def test_process_debug():
    done = shell("run", "kdd", "--debug")
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "ConfigError: there is no system 'kdd'" in done.stderr
