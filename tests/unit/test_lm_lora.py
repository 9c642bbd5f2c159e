"""Language students with adapters: only they are trained; the result is a plain model, with the adapters beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.models import new_causal_lm, output_head
from stillhouse.models.lora import add_lora, has_lora, save_merged_lm

FAMILIES = ["llama", "gpt2"]


def tiny(family: str) -> Any:
    """Of tied embeddings, so that a head with an adapter would be noticed; GPT-2 has linear layers of its own class."""
    from transformers import GPT2Config, LlamaConfig

    if family == "gpt2":
        return new_causal_lm(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2), seed=0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return new_causal_lm(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes), seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_as_nothing_and_are_all_that_is_trained(family):
    model = tiny(family).eval()
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    add_lora(model, rank=2, alpha=4, seed=0, layers=(), leave=output_head(model).path)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained) and not any("lm_head" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_a_plain_model_and_an_adapter_for_peft(family, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, model = tiny(family).eval(), tiny(family).eval()
    add_lora(model, rank=2, alpha=4, seed=0, layers=(), leave=output_head(model).path)
    assert has_lora(model) and not has_lora(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    ids = torch.arange(6)[None]
    tuned = model(input_ids=ids).logits
    assert not torch.allclose(tuned, base(input_ids=ids).logits, atol=1e-2)
    save_merged_lm(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not has_lora(plain)
    torch.testing.assert_close(plain(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-4)  # training can go on
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
