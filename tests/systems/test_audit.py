"""Audits of any run: the command, the field, the report, and what cannot be audited."""

from __future__ import annotations

import html
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from transformers import BertConfig, BertModel

from stillhouse.audit import audit_run
from stillhouse.base.errors import ConfigError, RunError
from stillhouse.cli.main import main
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate
from stillhouse.models.tokenizers import train_bpe
from stillhouse.report import write_report
from stillhouse.runs import Finished, stage_artifacts
from stillhouse.systems import get_system
from stillhouse.tasks import language
from stillhouse.workflow import run_system


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def values(materials: helpers.Materials) -> dict[str, Any]:
    return {**helpers.small_values(get_system("kd"), materials), "baseline": True, "audits": "hacking"}


@pytest.fixture(scope="module")
def made(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "tokens_per_second", partial(language.tokens_per_second, seconds=0.01))
        yield run_system("kd", values, output=tmp_path_factory.mktemp("audited") / "run", quiet=True)


@pytest.fixture
def run(made: Finished, tmp_path: Path) -> Path:
    """A copy of the run, to be audited and spoilt."""
    return Path(shutil.copytree(made.folder, tmp_path / "run"))


def page(folder: Path) -> str:
    return html.unescape((folder / "report.html").read_text())


def unfinished(folder: Path, *names: str) -> None:
    """As if these stages were still going."""
    for file in folder.glob("stages/*/stage.json"):
        record = json.loads(file.read_text())
        if record["name"] in names:
            file.write_text(json.dumps({**record, "status": "running"}))


def test_the_field_watches_the_distance_to_the_teacher_and_audits_at_the_end(made):
    (evals,) = (made.folder / "stages").glob("*-student/metrics.jsonl")
    course = [json.loads(line) for line in evals.read_text().splitlines()]
    watched = [line["metrics"]["teacher_kl"] for line in course if line["kind"] == "eval"]
    assert len(watched) > 5 and all(value > 0 for value in watched)
    table = stage_artifacts(made.folder / "audits" / "hacking")["hacking"].table()
    row = table.row("student")
    assert row["proxy"] == watched[-1] and "slope" in row and {one["name"] for one in table.rows} >= {"baseline"}
    text = page(made.folder)
    assert "Teacher hacking" in text and "audit hacking" in text and "proxy-and-its-law" in text


def test_fidelity_and_memorisation_are_added_without_training(run):
    weights = {file: file.stat().st_mtime_ns for file in run.glob("stages/**/*.safetensors")}
    found = audit_run(run, "fidelity", {"prompts": "6", "new_tokens": 8, "prompt_tokens": 4}, quiet=True)
    table = found.artifacts["fidelity"].table()
    assert [row["name"] for row in table.rows] == ["teacher", "student", "baseline"]
    assert all(0 <= row["bleu"] <= 1 for row in table.rows[1:]) and "p" in table.row("student")
    audit_run(run, "memorisation", {"prefix": 4, "suffix": 4, "sequences": 40, "repeats": 2}, quiet=True)
    text = page(run)
    assert all(title in text for title in ("Fidelity to the teacher", "Memorisation", "Teacher hacking"))
    assert {file: file.stat().st_mtime_ns for file in weights} == weights
    assert json.loads((run / "audits" / "fidelity" / "run.json").read_text())["status"] == "done"


def encoder(folder: Path) -> Path:
    """A small text encoder with new weights."""
    tokenizer = train_bpe([helpers.sentences(80)], vocab_size=300)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return folder / "encoder"


def test_a_teacher_compared_with_itself_is_faithful(run, materials, tmp_path):
    """The student's place is taken by the teacher's own weights."""
    (student,) = run.glob("stages/*-student/artifact")
    for file in materials.teacher.iterdir():
        shutil.copy(file, student / file.name)
    options = {"prompts": 4, "new_tokens": 6, "prompt_tokens": 4, "sentence_encoder": str(encoder(tmp_path))}
    table = audit_run(run, "fidelity", options, quiet=True).artifacts["fidelity"].table()
    row = table.row("student")
    assert (row["agreement"], row["bleu"], row["identical"]) == (1, 1, 1)
    assert row["cosine"] == pytest.approx(1, abs=1e-5) and table.row("baseline")["cosine"] < 1 - 1e-5


def test_distances_to_an_oracle(run, materials):
    options = {"oracle": str(materials.teacher), "prompts": 6, "prompt_tokens": 4, "new_tokens": 6}
    table = audit_run(run, "hacking", options, quiet=True).artifacts["hacking"].table()
    assert table.row("teacher")["to_oracle"] == pytest.approx(0, abs=1e-6)
    row = table.row("student")
    assert row["to_oracle"] == pytest.approx(row["to_teacher"], rel=1e-6) and row["to_oracle"] > 0  # hacking impossible


def test_audits_stay_when_the_run_is_gone_on_with(made, values):
    before = {name: one.fingerprint for name, one in stage_artifacts(made.folder).items()}
    times = {file: file.stat().st_mtime_ns for file in made.folder.glob("stages/**/*.safetensors")}
    run_system("kd", {**values, "audits": ""}, output=made.folder, quiet=True)
    assert (made.folder / "audits" / "hacking" / "stages").is_dir() and "Teacher hacking" in page(made.folder)
    assert {name: one.fingerprint for name, one in stage_artifacts(made.folder).items()} == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_run_that_is_going_has_curves_and_no_students(run):
    unfinished(run, "student", "baseline", "evaluation")
    shutil.rmtree(run / "audits")
    assert audit_run(run, "hacking", quiet=True).artifacts["hacking"].table().row("student")["proxy"] > 0
    with pytest.raises(RunError, match="no finished language model"):
        audit_run(run, "fidelity", quiet=True)
    assert not (run / "audits" / "fidelity").exists()


def test_an_audit_of_an_earlier_state_says_so(run):
    (file,) = run.glob("stages/*-student/stage.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "another"}))
    write_report(run)
    assert "the run has changed since" in page(run)


def test_what_cannot_be_audited_is_one_line(run, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'fidelity'"):
        audit_run(run, "fidelty")
    with pytest.raises(ConfigError, match="audit fidelity has no field 'prompt'"):
        audit_run(run, "fidelity", {"prompt": 3})
    with pytest.raises(RunError, match="not a run"):
        audit_run(tmp_path / "nothing", "hacking")
    Run(tmp_path / "own", quiet=True).execute([Evaluate("x", lambda context: {"value": 1})])
    for kind, words in (("fidelity", "no causal language models"), ("hacking", "no curve to look at")):
        with pytest.raises(RunError, match=words):
            audit_run(tmp_path / "own", kind)
    shutil.rmtree(next(run.glob("stages/*-evaluation")))
    unfinished(run, "baseline")
    with pytest.raises(RunError, match="baseline=true"):
        audit_run(run, "memorisation")


def test_on_the_command_line(run, capsys):
    main(["audit", str(run), "hacking", "early=0.5", "--json", "-q"])
    assert json.loads(capsys.readouterr().out)["title"] == "Teacher hacking"
    main(["audit", str(run), "hacking", "-q"])
    assert "report" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["audit", str(run), "hackin"])
    assert left.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
