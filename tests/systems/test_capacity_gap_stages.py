"""The stages of capacity-gap that are off by default: a larger vocabulary before, conversations after; other builds."""

from __future__ import annotations

import json

import helpers
import pytest

from stillhouse.base.errors import ConfigError
from stillhouse.models import new_causal_lm
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.systems import all_systems
from stillhouse.workflow import run_system

QUICK = {"students": ("layers=1,hidden_size=8,heads=1,intermediate_size=8",), "steps": 3, "baseline": False}


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def values(materials, **more):
    return {**helpers.small_values(all_systems()["capacity-gap"], materials), **QUICK, "chat": None, **more}


@pytest.mark.slow
def test_teachers_learn_a_larger_vocabulary_and_students_inherit_it(materials, tmp_path):
    (tmp_path / "tokens.txt").write_text("never\nbright river\n")
    (tmp_path / "talk.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"the old {word}?", "completion": f"a small {word}."}) for word in helpers.WORDS
        )
    )
    given = {"vocabulary": str(tmp_path / "tokens.txt"), "chat": str(tmp_path / "talk.jsonl"), "adapt_epochs": 0.2}
    teachers = (str(materials.teacher), "layers=2,hidden_size=24,heads=3,head_dim=8")
    wide = {"chat_epochs": 1.0, "teacher_epochs": 0.2, "window": 32, "teachers": teachers}
    done = run_system("capacity-gap", values(materials, **given, **wide), output=tmp_path / "run", quiet=True)
    old, tokenizer = load_causal_lm(str(materials.teacher))
    for name in ("adapt", "teacher-1-adapt", "teacher-2", "student", "chat"):
        model, own = load_causal_lm(str(done.artifacts[name].path))
        assert model.config.vocab_size == len(own) == len(tokenizer) + (1 if "never" in tokenizer.get_vocab() else 2)
        assert own.convert_tokens_to_ids("bright river") == len(own) - 1
    results = done.artifacts["evaluation"].metrics
    assert results["chat/chat_loss"] < results["student/chat_loss"]
    adapted = load_causal_lm(str(done.artifacts["adapt"].path))[0]
    moved = (adapted.model.embed_tokens.weight[:300] - old.model.embed_tokens.weight[:300]).detach().abs().max()
    assert 0 < float(moved) < 1e-3  # adapt_lr, not lr


def test_plain_text_is_no_conversation(materials, tmp_path):
    with pytest.raises(ConfigError, match="plain text"):
        run_system(
            "capacity-gap",
            values(materials, teachers=(), chat=str(materials.text)),
            output=tmp_path / "run",
            quiet=True,
        )


@pytest.mark.parametrize("kind", ["gpt2", "gpt-neox"])
def test_students_of_gpt2_and_pythia(materials, tmp_path, kind):
    from transformers import GPT2Config, GPTNeoXConfig

    tokenizer = load_causal_lm(str(materials.teacher))[1]
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = (
        GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=128, **ids)
        if kind == "gpt2"
        else GPTNeoXConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, **ids)
    )
    new_causal_lm(config, seed=0).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    given = {"teacher": str(tmp_path / "teacher"), "teachers": (), "students": ("scale:0.6",), "window": 16}
    done = run_system("capacity-gap", values(materials, **given), output=tmp_path / "run", quiet=True)
    student = load_causal_lm(str(done.artifacts["student"].path))[0]
    assert student.config.model_type == config.model_type
    assert student.config.hidden_size == 8 * student.config.num_attention_heads


def test_teachers_of_one_size_are_told_apart(materials, tmp_path):
    twins = (str(materials.teacher), str(materials.teacher))
    done = run_system("capacity-gap", values(materials, teachers=twins), output=tmp_path / "run", quiet=True)
    (row,) = done.artifacts["law"].table().rows
    losses = {name: loss for name, loss in row.items() if name.endswith(("(teacher-1)", "(teacher-2)"))}
    assert len(losses) == 2
    assert len({name for name in done.artifacts["evaluation"].metrics if name.startswith("teacher ")}) >= 2
