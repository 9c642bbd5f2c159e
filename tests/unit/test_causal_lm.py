"""Models and tokenizers: loading, scaling a student down, random weights, the output head."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from stillhouse.models import (
    check_output_head,
    check_same_tokenizer,
    has_remote_code,
    load_causal_lm,
    new_causal_lm,
    output_head,
    parameter_count,
    read_config,
    real_vocab_size,
    scaled_config,
    student_from_spec,
    train_bpe,
)
from stillhouse.models.scaling import _resampled, config_parameters

PROSE = ["The quick brown fox jumps over the lazy dog, again and again. " * 5, "Zürich, 東京 and 👩‍🚀 too."]
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def llama(**sizes) -> LlamaConfig:
    return LlamaConfig(**SIZES | {"intermediate_size": 64, "num_key_value_heads": 2} | IDS | sizes)


def gpt2(**sizes) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | IDS | sizes)


def qwen2(**sizes) -> Qwen2Config:
    return Qwen2Config(
        **SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True} | IDS | sizes
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(PROSE, vocab_size=300)


# Tokenizers


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_bpe_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bpe_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  The fox \n\n of Zürich\t<|endoftext|> 👩‍🚀 , . ' s"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert check_same_tokenizer(tokenizer, loaded) == len(tokenizer)


def test_bpe_special_tokens_and_size(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    assert 257 < len(tokenizer) <= 300
    assert len(train_bpe(["ab"], vocab_size=5000)) < 300
    three = train_bpe(PROSE, vocab_size=300, special_tokens=("</s>", "<a>", "<b>"))
    assert three("<a>x<b>")["input_ids"][::2] == three.convert_tokens_to_ids(["<a>", "<b>"])
    assert three.decode(three("<a>x<b></s>")["input_ids"], skip_special_tokens=True) == "x"


def test_bpe_is_the_same_every_time_in_every_process(tokenizer):
    code = (
        "import sys, json; from stillhouse.models import train_bpe;"
        "print(json.dumps(train_bpe(json.loads(sys.argv[1]), vocab_size=300).get_vocab(), sort_keys=True))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(PROSE)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == tokenizer.get_vocab()


def test_real_vocabulary_counts_added_tokens_not_padding(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    one, two = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for each in (one, two):
        each.add_tokens(["<tool>"])
    assert real_vocab_size(one) == len(tokenizer) + 1
    assert check_same_tokenizer(one, two) == len(tokenizer) + 1


# Loading


@pytest.mark.parametrize("config", [llama(), gpt2(), qwen2()], ids=lambda config: config.model_type)
def test_load_gives_what_was_saved(config, tokenizer, tmp_path):
    model = new_causal_lm(config, seed=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_causal_lm(str(tmp_path))
    assert not loaded.training
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert check_same_tokenizer(tokenizer, loaded_tokenizer) == len(tokenizer)
    assert read_config(str(tmp_path)).model_type == config.model_type
    assert not has_remote_code(tmp_path)


def test_load_in_another_dtype_and_attention(tokenizer, tmp_path):
    new_causal_lm(llama(), seed=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    half, _ = load_causal_lm(str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    assert half.dtype == torch.bfloat16
    assert half.config._attn_implementation == "eager"
    assert load_causal_lm(str(tmp_path), dtype=torch.float16)[0].dtype == torch.float16


def test_load_sharded_weights_and_a_relative_path(tokenizer, tmp_path, monkeypatch):
    model = new_causal_lm(llama(), seed=1)
    model.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    monkeypatch.chdir(tmp_path)
    loaded, _ = load_causal_lm("teacher")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_remote_code_is_seen(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "a.B"}}')
    assert has_remote_code(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    assert has_remote_code(tmp_path)


# Students

FAMILIES = [
    llama(num_hidden_layers=6, hidden_size=128, num_attention_heads=8, intermediate_size=344),
    qwen2(num_hidden_layers=8, hidden_size=96, num_attention_heads=6),
    Qwen3Config(**SIZES | {"hidden_size": 128, "num_hidden_layers": 6, "head_dim": 32, "intermediate_size": 256}),
    Gemma2Config(**SIZES | {"num_hidden_layers": 6, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 2}),
    Gemma3TextConfig(**SIZES | {"num_hidden_layers": 12, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 1}),
    Phi3Config(**SIZES | {"num_hidden_layers": 6, "hidden_size": 128} | IDS),
    gpt2(n_layer=6, n_embd=96, n_head=6),
    GPTNeoXConfig(**SIZES | {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 512}),
    GPTNeoConfig(
        **{"vocab_size": 300, "hidden_size": 64, "num_layers": 6, "num_heads": 4},
        attention_types=[[["global", "local"], 3]],
    ),
    OPTConfig(**SIZES | {"num_hidden_layers": 6, "hidden_size": 64, "ffn_dim": 256, "word_embed_proj_dim": 64}),
    FalconConfig(**SIZES | {"num_hidden_layers": 6, "hidden_size": 128}),
    SmolLM3Config(**SIZES | {"num_hidden_layers": 8, "hidden_size": 128, "num_attention_heads": 8} | IDS),
    Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 4, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
    ),
]
NAMES = [config.model_type for config in FAMILIES]


@pytest.mark.parametrize("config", FAMILIES, ids=NAMES)
def test_scaled_student_fits_the_budget_and_runs(config):
    budget = 0.3 * config_parameters(config)
    student = scaled_config(config, ratio=0.3)
    model = new_causal_lm(student, seed=0)
    assert type(student) is type(config)
    assert 0.75 * budget < parameter_count(model) == config_parameters(student) <= budget
    assert student.vocab_size == config.vocab_size
    assert torch.isfinite(model(input_ids=torch.arange(10)[None]).logits).all()
    assert len(getattr(student, "layer_types", None) or range(student.num_hidden_layers)) == student.num_hidden_layers
    heads, groups = student.num_attention_heads, getattr(student, "num_key_value_heads", None)
    assert groups is None or heads % groups == 0


@pytest.mark.parametrize(
    ("config", "ratio"),
    [
        (LlamaConfig(num_hidden_layers=16, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8,
                     intermediate_size=8192, vocab_size=128256, head_dim=64, tie_word_embeddings=True), 0.5),
        (Qwen2Config(num_hidden_layers=24, hidden_size=896, num_attention_heads=14, num_key_value_heads=2,
                     intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True), 0.25),
        (GPT2Config(), 0.1),
    ],
    ids=["llama-1b", "qwen2-0.5b", "gpt2"],
)  # fmt: skip
def test_students_of_real_sizes_are_near_the_budget_and_in_proportion(config, ratio):
    student = scaled_config(config, ratio=ratio)
    share = config_parameters(student) / config_parameters(config)
    assert 0.93 * ratio < share <= ratio
    depth = student.num_hidden_layers / config.num_hidden_layers
    width = student.hidden_size / config.hidden_size
    assert 0.4 < depth / width < 2.5
    per_head = student.hidden_size / student.num_attention_heads
    assert 0.5 < per_head / (config.hidden_size / config.num_attention_heads) < 2


def test_teacher_config_is_not_changed():
    config = llama(num_hidden_layers=4)
    before = config.to_dict()
    scaled_config(config, ratio=0.5)
    scaled_config(config, layers=1)
    new_causal_lm(config, seed=0)
    assert config.to_dict() == before


def test_scale_one_is_the_teacher():
    config = llama(num_hidden_layers=4)
    same = scaled_config(config, ratio=1.0)
    assert config_parameters(same) == config_parameters(config)
    assert same.num_hidden_layers == 4


def test_sizes_given_are_kept_with_and_without_ratio():
    config = llama(num_hidden_layers=8, hidden_size=128, num_attention_heads=8, intermediate_size=344)
    student = scaled_config(config, layers=3, hidden_size=64)
    assert (student.num_hidden_layers, student.hidden_size) == (3, 64)
    assert (student.num_attention_heads, student.num_key_value_heads, student.head_dim) == (4, 1, 16)
    assert student.intermediate_size == 176
    for given_sizes in ({"layers": 2}, {"hidden_size": 64, "intermediate_size": 96}, {"heads": 4}):
        student = scaled_config(config, ratio=0.4, **given_sizes)
        assert config_parameters(student) <= 0.4 * config_parameters(config)
        names = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
        for name, value in given_sizes.items():
            assert getattr(student, names.get(name, name)) == value
    alone = scaled_config(config, layers=2)
    assert (alone.hidden_size, alone.num_attention_heads, alone.intermediate_size) == (128, 8, 344)
    wide = scaled_config(config, heads=4, kv_heads=4, head_dim=64, intermediate_size=100)
    assert (wide.num_attention_heads, wide.num_key_value_heads, wide.head_dim) == (4, 4, 64)


def test_gpt2_keeps_its_default_feed_forward_and_takes_another():
    assert scaled_config(gpt2(), layers=1).n_inner is None
    assert scaled_config(gpt2(n_inner=100), hidden_size=16).n_inner == 48


def test_layer_types_follow_the_depth():
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(**SIZES | {"num_hidden_layers": 12, "head_dim": 16, "num_key_value_heads": 1})
    assert config.layer_types == pattern * 2
    assert scaled_config(config, layers=8).layer_types == (pattern * 2)[:8]
    assert scaled_config(config, layers=3).layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    assert scaled_config(config, layers=1).layer_types == ["full_attention"]


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12), st.integers(1, 12))
def test_resampled_lists_have_the_length_and_keep_the_whole_when_it_fits(values, count):
    found = _resampled(values, count)
    assert len(found) == count
    assert set(found) <= set(values)
    if count <= len(values) and set(values[:count]) == {*values} and len({*values}) == 1:
        assert found == values[:count]
    if count == len(values):
        assert found == values


def test_the_language_part_of_a_model_that_sees():
    text = {**SIZES, "num_hidden_layers": 6, "head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 64}
    student = scaled_config(Gemma3Config(text_config=text), layers=2)
    assert isinstance(student, Gemma3TextConfig)
    new_causal_lm(student, seed=0)


@pytest.mark.parametrize("spec", [" scale = 0.5 ", "layers=2,scale:0.5"])
def test_spec_of_a_scale(spec):
    config = llama(num_hidden_layers=8, hidden_size=64)
    layers = 2 if "layers" in spec else None
    assert student_from_spec(spec, config).to_dict() == scaled_config(config, ratio=0.5, layers=layers).to_dict()


def test_spec_of_sizes():
    config = llama(num_hidden_layers=8, hidden_size=64)
    expected = scaled_config(config, layers=4, hidden_size=32, heads=2).to_dict()
    assert student_from_spec("layers=4,hidden_size=32, heads=2", config).to_dict() == expected
    assert student_from_spec("num_hidden_layers=4,hidden_size=32,num_attention_heads=2", config).to_dict() == expected


# Random weights


@pytest.mark.parametrize("config", [llama(), gpt2(), qwen2()], ids=lambda config: config.model_type)
def test_random_weights_depend_on_the_seed_only(config):
    one, torch_before = new_causal_lm(config, seed=3), torch.random.get_rng_state()
    numpy_before, python_before = np.random.get_state()[1].tolist(), random.getstate()
    torch.manual_seed(99)
    two, three = new_causal_lm(config, seed=3), new_causal_lm(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))
    torch.random.set_rng_state(torch_before)
    new_causal_lm(config, seed=5)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before
    assert random.getstate() == python_before


def test_student_of_a_half_precision_teacher_is_float32():
    assert new_causal_lm(llama(dtype="bfloat16"), seed=0).dtype == torch.float32
    assert new_causal_lm(llama(), seed=0, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tied_weights_count_once():
    tied, free = (new_causal_lm(llama(tie_word_embeddings=tie), seed=0) for tie in (True, False))
    assert parameter_count(free) - parameter_count(tied) == 300 * 32


# The head

HEADS = [
    (llama(), "lm_head", None, 1.0),
    (gpt2(), "lm_head", None, 1.0),
    (GPTNeoXConfig(**SIZES, intermediate_size=64), "lm_head", None, 1.0),
    (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05, query_pre_attn_scalar=8), "lm_head", 0.05, 1.0),
    (GraniteConfig(**SIZES, logits_scaling=8.0, intermediate_size=64, num_key_value_heads=2), "lm_head", None, 0.125),
    (CohereConfig(**SIZES, logit_scale=0.0625, intermediate_size=64) , "lm_head", None, 0.0625),
    (Cohere2Config(**SIZES, logit_scale=0.25, intermediate_size=64), "lm_head", None, 0.25),
    (HyperCLOVAXConfig(**SIZES, logits_scaling=3.0, intermediate_size=64), "lm_head", None, 3.0),
    (
        FalconH1Config(**SIZES, lm_head_multiplier=0.5, intermediate_size=64, num_key_value_heads=2,
                       mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        "lm_head", None, 0.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "path", "softcap", "scale"), HEADS, ids=[head[0].model_type for head in HEADS])
def test_head_formula_gives_the_logits(config, path, softcap, scale):
    torch.manual_seed(0)
    model = new_causal_lm(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    head = output_head(model)
    assert head == (path, softcap, scale)
    assert model.get_submodule(path) is model.get_output_embeddings()
    model.train()
    check_output_head(model, head)
    assert model.training
    assert not model.get_submodule(path)._forward_hooks
