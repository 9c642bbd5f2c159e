"""BiStil (card 065): what each of its stages is given, and what its sparse differences leave alone."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from watching import watched

from stillhouse import Run
from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.models.sparse_masks import SparseDifference, encoder_parameters
from stillhouse.models.text_classifier import load_text_classifier
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.systems import get_system
from stillhouse.tasks.bilingual import BilingualTask, read_ids
from stillhouse.tasks.text_classification import demo_labelled

ENGLISH = ["one", "two", "three", "four", "five", "six"]
ITALIAN = ["uno", "due", "tre", "quattro", "cinque", "sei"]
GERMAN = ["eins", "zwei", "drei", "vier"]  # the teacher knows it too
DENSITY = 0.1


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A BERT of three languages with dropout, text of two of them, labels in both."""
    folder = tmp_path_factory.mktemp("bistil")
    tokenizer = word_tokenizer(ENGLISH + GERMAN + ITALIAN)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_attention_heads=3, intermediate_size=20, num_hidden_layers=4,
        max_position_embeddings=16, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, words in (("english", ENGLISH), ("italian", ITALIAN)):
        lines = [" ".join(pair * 2) for pair in itertools.product(words, words)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
        rows = [{"text": " ".join(pair), "label": n % 2} for n, pair in enumerate(itertools.product(words, words))]
        (folder / f"{name}-labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "teacher": str(folder / "teacher"),
        "texts": (str(folder / "english.jsonl"), str(folder / "italian.jsonl")),
        "data": str(folder / "english-labels.jsonl"),
        "target_data": str(folder / "italian-labels.jsonl"),
        "density": DENSITY,
        "language_steps": (2, 2),
        "teacher_steps": (2, 2),
        "task_steps": (2, 2),
        "general_steps": 4,
        "language_lr": 1e-2,
        "general_lr": 1e-2,
        "lr": 1e-2,
        "warmup": 0.0,
        "batch_size": 12,
        "length": 8,
        "validation": 0.2,
        "selection": 0.2,
        "eval_examples": 4,
        "keep": "best",
    }


def taken(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], names: list[str]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in names)


def with_changes(model: nn.Module, *folders: Path) -> dict[str, Tensor]:
    changed = copy.deepcopy(model)
    for folder in folders:
        SparseDifference.load(folder).add_to(changed)
    return taken(changed)


@pytest.fixture(scope="module")
def ran(materials: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run: its stages, what they left, and what each stage of training was given when its turn came."""
    given: dict[str, dict[str, Any]] = {}

    def look(stage: Any, left: dict[str, Artifact]) -> None:
        if not hasattr(stage, "players"):
            return
        player = stage.players
        student = player.trained[0]
        parts = getattr(player.objective, "terms", [player.objective])
        teachers = [one for one in player.objective.observed() if one is not student]
        state = stage.source.state_dict()
        batches = [next(stage.source) for _ in range(2)]
        stage.source.load_state_dict(state)
        layer = "bert.encoder.layer.3"
        given[stage.name] = {
            "start": taken(student.module),
            "kind": type(student.module).__name__,
            "terms": {part.name for part in parts},
            "teacher": taken(teachers[0].module) if teachers else None,
            "batches": batches,
            "said": [one.tap(layer)(batch) for one in teachers for batch in batches],
            "best": stage.best,
            "steps": stage.steps,
        }

    seen, left = watched(get_system("bistil").make(**materials), tmp_path_factory.mktemp("run") / "run", look)
    return {"seen": seen, "left": left, "given": given}


def base(materials: dict[str, Any]) -> Any:
    return load_text_classifier(materials["teacher"], classes=("0", "1"), seed=0)


def places(model: nn.Module) -> int:
    parameters = dict(model.named_parameters())
    return round(DENSITY * sum(parameters[name].numel() for name in encoder_parameters(model)))


@pytest.mark.parametrize(("number", "words"), [(0, ENGLISH), (1, ITALIAN)])
def test_each_language_has_a_sparse_difference_from_its_own_text(ran, materials, number, words):
    tokenizer, plain = word_tokenizer(ENGLISH + GERMAN + ITALIAN), base(materials)
    names = encoder_parameters(plain)
    for name in (f"language-{number}-full", f"language-{number}"):
        given = ran["given"][name]
        assert given["kind"] == "BertForMaskedLM" and given["terms"] == {"MaskedTokens"} and given["steps"] == 2
        assert same(given["start"], taken(plain), names)
        rows = ran["seen"][name].source.source.data
        text = tokenizer.batch_decode(rows[list(range(len(rows)))]["input_ids"], skip_special_tokens=True)
        assert {word for line in text for word in line.split()} == set(words)
    made = SparseDifference.load(ran["left"][f"language-{number}"].path)
    assert len(made) == places(plain) and any(float(values.abs().max()) > 0 for _, values in made.entries.values())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_task_is_learnt_at_some_places_of_the_adapted_encoder_alone(ran, materials, role):
    left, given = ran["left"], ran["given"]
    full, sparse = given[f"{role}-full"], given[role]
    after = load_file(left[role].path / "model.safetensors")
    model = load_text_classifier(str(left[role].path))
    names = encoder_parameters(model)
    if role == "teacher":
        expected = with_changes(base(materials), left["language-0"].path)
        assert full["teacher"] is None and full["terms"] == {"Labels"}
    else:
        expected = load_file(left["general"].path / "model.safetensors")
        assert full["terms"] == sparse["terms"] == {"Inner", "Soft"}
        tuned = load_file(left["teacher"].path / "model.safetensors")
        assert all(same(one["teacher"], tuned, list(tuned)) for one in (full, sparse))
    assert same(full["start"], expected, names) and same(sparse["start"], expected, names)
    made = SparseDifference.load(left[role].path)
    assert len(made) == places(model)
    changed = {name: (after[name] != expected[name]).flatten() for name in names}
    assert 0 < sum(int(one.sum()) for one in changed.values()) <= places(model)
    for name, one in changed.items():
        allowed = torch.zeros_like(one)
        if name in made.entries:
            allowed[made.entries[name][0]] = True
        assert not (one & ~allowed).any()
    assert all(len(batch["labels"]) == 12 for batch in full["batches"])


def test_the_general_phase_matches_a_teacher_adapted_to_the_language_of_the_batch(ran, materials):
    left, given = ran["left"], ran["given"]["general"]
    start, plain = load_file(left["start"].path / "model.safetensors"), base(materials)
    assert given["terms"] == {"Inner"} and same(given["start"], start, list(start))
    assert [int(batch["language"][0]) for batch in given["batches"]] == [0, 1]
    assert same(given["teacher"], taken(plain), encoder_parameters(plain))
    old = read_ids(left["start"])
    for number, (batch, said) in enumerate(zip(given["batches"], given["said"], strict=True)):
        teacher = copy.deepcopy(plain).eval()
        SparseDifference.load(left[f"language-{number}"].path).add_to(teacher)
        inputs = {"input_ids": old[batch["input_ids"]], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            expected = teacher(**inputs, output_hidden_states=True).hidden_states[-1]
            without = plain.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(said, expected)
        assert not torch.allclose(said, without, atol=1e-4)


def test_a_state_is_chosen_by_the_labels_only_where_they_are_learnt(ran):
    best = {name: given["best"] for name, given in ran["given"].items()}
    chosen = {"teacher-full", "teacher", "student-full", "student"}
    assert {name for name, one in best.items() if one == "selection_loss"} == chosen
    assert best["general"] is None


def test_the_student_is_cut_out_of_the_teacher_without_its_dropout(ran, materials):
    config = json.loads((ran["left"]["start"].path / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.0
    assert base(materials).config.hidden_dropout_prob == 0.1
    assert config["num_hidden_layers"] == 2 and len(read_ids(ran["left"]["start"])) == 12 + 5  # both languages, marks


def test_the_teacher_is_measured_in_each_language_with_its_difference(ran, materials):
    models = ran["seen"]["evaluation"].function.args[0]
    left, plain = ran["left"], base(materials)
    for number, side in enumerate(("source", "target")):
        found = taken(models["teacher"][1](side))
        expected = with_changes(plain, left[f"language-{number}"].path, left["teacher"].path)
        assert same(found, expected, encoder_parameters(plain))


def test_the_embedded_languages_are_those_of_the_texts(ran, materials):
    system: Any = get_system("bistil").make(texts="demo:2,demo:1", train_size=20)

    def prepared(texts: tuple[str, ...]) -> Any:
        run = Run("unused", quiet=True)
        stages = BilingualTask.prepare_languages(system, run, texts=texts, target_data="demo")
        next(stages)
        with pytest.raises(StopIteration) as end:
            stages.send(Artifact(Path(materials["teacher"])))
        return end.value.value

    task = prepared(system.texts)
    train, validation = demo_labelled(2, 4)
    assert task.validation.first == validation.first and set(task.train.first) <= set(train.first)
    assert task.target.first == demo_labelled(1, 4)[1].first
    usual = prepared(("demo:0", "demo:3", "demo:1"))
    assert usual.validation.first == demo_labelled(0, 4)[1].first
    assert usual.target.first == demo_labelled(3, 4)[1].first
    for texts in (("demo:0", "demo:4"), ("demo", "demo:1")):
        with pytest.raises(ConfigError, match="demo:0 to demo:3"):
            prepared(texts)
