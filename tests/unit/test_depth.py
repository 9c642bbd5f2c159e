"""Taking layers out of a model: what is left computes as before, saves, loads, and keeps a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from stillhouse.base.errors import ModelError
from stillhouse.models import new_causal_lm
from stillhouse.models.depth import layer_paths, with_layers

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen2Config])
def model(request):
    return new_causal_lm(request.param(**SIZES), seed=0).eval()


def test_all_layers_kept_change_nothing(model):
    assert layer_paths(model) == [f"model.layers.{number}" for number in range(4)]
    torch.testing.assert_close(with_layers(model, range(4))(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_what_is_left_is_the_model_with_identities_in_place_of_the_rest(model, tmp_path):
    cut = with_layers(model, [0, 3])
    passed = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out: args[0] if args else kwargs["hidden_states"], with_kwargs=True
        )
        for number, layer in enumerate(model.model.layers)
        if number in (1, 2)
    ]
    expected = model(IDS, use_cache=False).logits
    for hook in passed:
        hook.remove()
    torch.testing.assert_close(cut(IDS).logits, expected)
    assert not torch.allclose(cut(IDS).logits, model(IDS).logits, atol=1e-4)  # and the original is whole
    cut.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)


def test_the_layers_find_themselves_in_the_cache(model):
    cut = with_layers(model, [1, 3])
    whole = cut(IDS).logits[:, -1]
    first = cut(IDS[:, :-1], use_cache=True)
    torch.testing.assert_close(cut(IDS[:, -1:], past_key_values=first.past_key_values).logits[:, -1], whole)


@pytest.mark.parametrize("kept", [[], [4], [-1]])
def test_layers_that_are_not_there(model, kept):
    with pytest.raises(ModelError, match="0 to 3"):
        with_layers(model, kept)
