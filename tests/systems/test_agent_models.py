"""Text encoders: pooled over real tokens only, whatever else is in the batch; and memory with a user's own models."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

from stillhouse.base.errors import DataError, ModelError
from stillhouse.models.text_encoder import TextEncoder
from stillhouse.models.tokenizers import train_bpe
from stillhouse.workflow import run_system


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_bpe([helpers.sentences(80)], vocab_size=300)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_does_not_depend_on_its_neighbours(encoder):
    embed = TextEncoder(str(encoder))
    alone = embed(["the cat sees a dog"])
    beside = embed(["the cat sees a dog", "then the old bird never hears the small bright river and the stone"])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(beside, axis=1), 1, atol=1e-6)
    hidden = embed.model(**embed.tokenizer(["the cat sees a dog"], return_tensors="pt")).last_hidden_state
    mean = hidden[0].mean(0)
    np.testing.assert_allclose(alone[0], (mean / mean.norm()).detach().numpy(), atol=1e-5)


def test_what_is_too_long_is_cut(encoder):
    embed = TextEncoder(str(encoder))
    assert np.isfinite(embed(["the cat " * 500])).all()


def test_the_pooling_of_sentence_transformers_is_obeyed(encoder, tmp_path):
    embed = TextEncoder(str(encoder))
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    first = TextEncoder(str(tmp_path))
    hidden = embed.model(**embed.tokenizer(["the cat"], return_tensors="pt")).last_hidden_state[0, 0].detach()
    np.testing.assert_allclose(first(["the cat"])[0], (hidden / hidden.norm()).numpy(), atol=1e-5)


def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        TextEncoder(str(tmp_path / "nowhere"))


def test_memory_with_the_users_encoder(encoder, tmp_path):
    fields = {"exchanges": 12, "embedder": str(encoder), "trackers": []}
    done = run_system("agent-memory", fields, output=tmp_path / "run", quiet=True)
    assert 0 <= done.artifacts["evaluation"].metrics["distilled/vector/mrr"] <= 1


def test_a_teacher_that_cannot_write_the_form_is_said_so(tmp_path):
    """A tiny language model, in this process, babbles: nothing fits, and one line says what to do."""
    (tmp_path / "materials").mkdir()
    made = helpers.make_materials(tmp_path / "materials")
    fields = {"exchanges": 12, "teacher": str(made.teacher), "max_tokens": 4, "trackers": []}
    with pytest.raises(DataError, match="wrote no memory that fits the form"):
        run_system("agent-memory", fields, output=tmp_path / "run", quiet=True)
