"""Every system, found by discovery, runs on tiny models, is killed, resumed, saved, and loaded by its ecosystem."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from stillhouse.core.system import System
from stillhouse.runs import Finished, stage_artifacts
from stillhouse.systems import all_systems
from stillhouse.workflow import resume, run_system

# of module scope, so that the tests of one system stand together and one worker runs it for all of them
SYSTEMS = pytest.mark.parametrize("name", all_systems(), scope="module")


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def finished(materials: helpers.Materials, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``name -> the system, run without interruption``; made when asked for."""
    known: dict[str, Finished] = {}

    def run(name: str) -> Finished:
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "run"
            known[name] = run_system(name, values(name, materials), output=folder, quiet=True)
        return known[name]

    return run


def system(name: str) -> type[System]:
    return all_systems()[name]


def values(name: str, materials: helpers.Materials) -> dict[str, Any]:
    return helpers.small_values(system(name), materials)


def losses(folder: Path) -> list[tuple[int, float]]:
    """The course of the stages that train."""
    lines = [json.loads(line) for file in sorted(folder.glob("stages/*/metrics.jsonl")) for line in file.open()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


@SYSTEMS
def test_runs_to_the_end(name, finished):
    done = finished(name)
    record = json.loads((done.folder / "run.json").read_text())
    assert (record["status"], record["error"], record["system"]) == ("done", None, name)
    assert system(name).product in done.artifacts
    for artifact in done.artifacts.values():
        assert artifact.path.is_dir() and any(artifact.path.iterdir())
    assert not list(done.folder.rglob("checkpoints")) and not list(done.folder.rglob("*.tmp"))
    assert done.report == done.folder / "report.html"
    page = html.unescape(done.report.read_text())
    assert system(name).meta.title in page and "</html>" in page


@SYSTEMS
def test_killed_and_resumed_it_ends_with_the_same_weights(name, finished, materials, tmp_path):
    folder = tmp_path / "run"
    helpers.run_and_kill(name, values(name, materials), folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    done = resume(folder, quiet=True)
    whole = finished(name)
    assert done.artifacts.keys() == whole.artifacts.keys()
    compared = 0
    for stage, artifact in whole.artifacts.items():
        expected, found = helpers.content(artifact.path), helpers.content(done.artifacts[stage].path)
        assert expected.keys() == found.keys(), stage
        assert [key for key in expected if not helpers.same(expected[key], found[key])] == [], stage
        compared += len(expected)
    assert compared
    assert losses(folder) == losses(whole.folder)
    assert (folder / "report.html").exists()
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_the_comparison_can_tell_runs_apart(finished, materials, tmp_path):
    name = "sft"
    done = run_system(name, {**values(name, materials), "seed": 1}, output=tmp_path / "run", quiet=True)
    product = system(name).product
    one, other = (helpers.weights(run.artifacts[product].path) for run in (done, finished(name)))
    assert any(not torch.equal(one[key], other[key]) for key in one)


@SYSTEMS
def test_the_result_is_loaded_by_transformers(name, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished(name).folder / "model"
    config = folder / "config.json"
    if not config.exists() or "CausalLM" not in config.read_text():
        pytest.skip("the result is not a causal language model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "the cat sees"
    special = set(tokenizer.all_special_ids)
    if special & set(tokenizer(text, add_special_tokens=False).input_ids):  # an embedded language without these letters
        text = tokenizer.decode([token for token in range(len(tokenizer)) if token not in special][:4])
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        again = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert torch.isfinite(logits).all() and logits.shape[:2] == ids.shape
    assert again.shape[1] >= ids.shape[1] + 1
    saved = helpers.weights(folder)
    for key, tensor in model.state_dict().items():
        if key in saved:
            assert torch.equal(tensor, saved[key])
    assert len(saved) >= 5


@SYSTEMS
def test_the_result_has_a_card(name, finished, materials):
    folder = finished(name).folder / "model"
    if not any((folder / file).exists() for file in ("config.json", "model_index.json")):
        pytest.skip("the result is not a model of transformers or diffusers")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "\n---\n" in card[4:]  # the metadata of a hub model card
    assert system(name).meta.title in card
    from huggingface_hub import ModelCard

    data = ModelCard(card).data.to_dict()
    assert data.get("library_name") in ("transformers", "diffusers", "stillhouse")


@pytest.mark.parametrize("name", ["sft", "kd", "taid"])
def test_it_learns_something(name, finished):
    """Not more than that the loss falls: twenty steps prove no method."""
    course = losses(finished(name).folder)
    assert [step for step, _ in course][-1] == 22
    assert course[-1][1] < course[0][1]


@SYSTEMS
def test_what_is_done_is_not_done_again(name, finished, materials):
    done = finished(name)
    product = done.artifacts[system(name).product].path
    before = {file: file.stat().st_mtime_ns for file in product.rglob("*")}
    again = run_system(name, values(name, materials), output=done.folder, quiet=True)
    assert {file: file.stat().st_mtime_ns for file in before if file.name != "README.md"} == {
        file: time for file, time in before.items() if file.name != "README.md"
    }
    assert {key: one.fingerprint for key, one in again.artifacts.items()} == {
        key: one.fingerprint for key, one in done.artifacts.items()
    }


def test_the_result_of_a_run_is_found_without_running_it(finished):
    done = finished("sft")
    assert stage_artifacts(done.folder).keys() == done.artifacts.keys()


def test_kd_from_the_teachers_kept_outputs(finished, materials, tmp_path):
    """All outputs kept teach what the live teacher does; a few of them something near it, and other than it."""

    def student(topk: int) -> dict[str, torch.Tensor]:
        chosen = {**values("kd", materials), "teacher_topk": topk}
        return helpers.weights(
            run_system("kd", chosen, output=tmp_path / str(topk), quiet=True).artifacts["student"].path
        )

    live = helpers.weights(finished("kd").artifacts["student"].path)
    whole, few = student(10_000), student(4)
    for name, tensor in live.items():
        torch.testing.assert_close(whole[name], tensor, atol=1e-4, rtol=1e-3)
    assert max(float((few[name] - tensor).abs().max()) for name, tensor in live.items()) > 1e-3
