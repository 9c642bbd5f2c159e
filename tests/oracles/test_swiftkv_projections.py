"""SwiftKV (card 182) where one projection gives queries, keys and values, and where keys and values are latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Observed
from stillhouse.models.conversion import attention_paths
from stillhouse.models.swiftkv import (
    Layout,
    cache_bytes,
    convert_swiftkv,
    load_swiftkv,
    original,
    prefill_cost,
    projections,
)
from stillhouse.objectives.swiftkv import knowledge_preserved

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "tie_word_embeddings": True}
MLA = {
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
KINDS: dict[str, Any] = {
    "phi3": (Phi3ForCausalLM, Phi3Config, GROUPED),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "deepseek_v2": (DeepseekV2ForCausalLM, DeepseekV2Config, MLA),
    "deepseek_v2_lite": (DeepseekV2ForCausalLM, DeepseekV2Config, {**MLA, "q_lora_rank": None}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, MLA),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def teacher(kind: str, *, layers: int = 5) -> Any:
    torch.manual_seed(0)
    model, config, sizes = KINDS[kind]
    made = model(config(**COMMON, **sizes, num_hidden_layers=layers)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:  # ones would hide a norm that is not used
                parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
            elif name.endswith(("query_key_value.bias", "dense.bias")):
                parameter.normal_(0, 0.3)
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))


def layers_of(model: Any) -> list[Any]:
    return [model.get_submodule(path.rpartition(".")[0]) for path in attention_paths(model)]


def attentions(model: Any) -> list[Any]:
    return [model.get_submodule(path) for path in attention_paths(model)]


@every_kind
@torch.no_grad()
def test_switched_off_or_with_the_last_layer_alone_it_is_the_original(kind, ids):
    before = teacher(kind)
    expected = before(ids).logits
    model = convert_swiftkv(before, first=2, group=2)
    with original(model):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
    assert torch.equal(convert_swiftkv(before, first=5)(ids).logits, expected)
    torch.testing.assert_close(convert_swiftkv(before, first=4)(ids).logits, expected, rtol=1e-4, atol=1e-4)


@every_kind
@torch.no_grad()
def test_layers_that_add_nothing_do_not_care(kind, ids):
    before = teacher(kind)
    for layer, attention in zip(layers_of(before)[2:], attentions(before)[2:], strict=True):
        for name, parameter in (*attention.named_parameters(), *layer.mlp.named_parameters()):
            if name.rpartition(".")[0].endswith(("o_proj", "dense", "down_proj", "dense_4h_to_h")) or name.endswith(
                "down_proj"
            ):
                parameter.zero_()
    for group in (1, 2):
        model = convert_swiftkv(before, first=2, group=group)
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)


@every_kind
@torch.no_grad()
def test_keys_and_values_are_made_of_z(kind, ids):
    """The original with hooks: in every upper layer keys and values, or the latent, are made of z, queries of x."""
    before, first = teacher(kind), 2
    expected = convert_swiftkv(before, first=first)(ids).logits
    kept: dict[str, torch.Tensor] = {}
    entry = layers_of(before)[first]

    def remember(layer: Any, args: Any, kwargs: Any) -> None:
        kept["z"] = layer.input_layernorm(args[0] if args else kwargs["hidden_states"])

    hooks = [entry.register_forward_pre_hook(remember, with_kwargs=True)]
    for attention in attentions(before)[first:]:
        if "deepseek" in kind:
            hooks.append(attention.kv_a_proj_with_mqa.register_forward_pre_hook(lambda *_: (kept["z"],)))
            continue

        def mix(fused: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            of_z = torch.nn.functional.linear(kept["z"], fused.weight, fused.bias)
            if kind == "phi3":
                return torch.cat([output[..., :32], of_z[..., 32:]], -1)
            own, other = output.view(2, 12, 4, 24), of_z.view(2, 12, 4, 24)
            return torch.cat([own[..., :8], other[..., 8:]], -1).flatten(-2)

        name = "qkv_proj" if kind == "phi3" else "query_key_value"
        hooks.append(getattr(attention, name).register_forward_hook(mix))
    torch.testing.assert_close(before(ids).logits, expected, rtol=1e-4, atol=1e-4)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("group", [1, 3])
@torch.no_grad()
def test_a_phi_is_a_llama_whose_projections_are_one(group, ids):
    phi = teacher("phi3")
    llama = LlamaForCausalLM(LlamaConfig(**COMMON, **GROUPED, num_hidden_layers=5, rms_norm_eps=1e-5)).eval()
    found = {}
    for name, tensor in phi.state_dict().items():
        if "qkv_proj" in name:
            for part, piece in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = piece
        elif "gate_up_proj" in name:
            for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj")] = piece
        else:
            found[name] = tensor
    llama.load_state_dict(found)
    own, theirs = (convert_swiftkv(one, first=2, group=group) for one in (phi, llama))
    torch.testing.assert_close(own(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    new = [{n: p for n, p in one.named_parameters() if p.requires_grad} for one in (own, theirs)]
    assert sum(p.numel() for p in new[0].values()) == sum(p.numel() for p in new[1].values())


def test_what_is_joined_is_what_was_split():
    x = torch.arange(24.0)
    plain, rows = Layout((12, 6, 6)), Layout((8, 8, 8), heads=2)
    assert [part.tolist() for part in plain.split(x)] == [[*range(12)], [*range(12, 18)], [*range(18, 24)]]
    assert rows.split(x)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    for layout in (plain, rows):
        assert torch.equal(layout.join(layout.split(x)), x)


@every_kind
def test_what_learns(kind):
    before = teacher(kind)
    model = convert_swiftkv(before, first=2, group=2)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not {p.data_ptr() for p in learning.values()} & {p.data_ptr() for p in before.parameters()}
    own: dict[int, set[str]] = {2: set(), 3: set(), 4: set()}
    for index, path in enumerate(attention_paths(model)):
        for name in learning:
            if name.startswith(f"{path}."):
                own[index].add(name.removeprefix(f"{path}."))
    if "deepseek" in kind:
        queries = {"q_proj"} if kind.endswith("lite") else {"q_a_proj", "q_a_layernorm", "q_b_proj"}
        pair = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"}
        parts = [{f"{name}.new.weight" for name in names} for names in (queries, pair)]
    else:
        name, leaves = ("qkv_proj", ["weight"]) if kind == "phi3" else ("query_key_value", ["weight", "bias"])
        parts = [
            {f"{name}.new.{role}.{leaf}" for role in roles for leaf in leaves}
            for roles in (["query"], ["key", "value"])
        ]
    assert own == {2: parts[0] | parts[1], 3: parts[0], 4: parts[0] | parts[1]}
    assert sum(name.startswith("swiftkv.norm.") for name in learning) == len(learning) - sum(map(len, own.values()))


def test_latents_of_a_group_begin_with_the_mean():
    before = teacher("deepseek_v3")
    own, new = attentions(before), attentions(convert_swiftkv(before, first=2, group=2))
    for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"):
        mean = sum(getattr(own[index], name).weight for index in (2, 3)) / 2
        torch.testing.assert_close(getattr(new[2], name).new.weight, mean)
        assert getattr(new[3], name).new is None
    assert torch.equal(new[3].q_b_proj.new.weight, own[3].q_b_proj.weight)


@every_kind
@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_an_early_stop_and_generation(kind, group, ids):
    model = convert_swiftkv(teacher(kind), first=2, group=group)
    found = model(ids, use_cache=True, logits_to_keep=1)
    torch.testing.assert_close(found.logits, model(ids, use_cache=False).logits[:, -1:], rtol=1e-3, atol=1e-3)
    kept = model(ids, use_cache=True).past_key_values
    assert cache_bytes(found.past_key_values) == cache_bytes(kept) > 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(model.generate(**given, **options), model.generate(**given, **options, use_cache=False))


@torch.no_grad()
def test_a_latent_cache_is_counted():
    """A latent of 10 and a rotary key of 4, in single precision, one pair for two layers."""
    before = teacher("deepseek_v3")
    model = convert_swiftkv(before, first=2, group=2)
    own, whole = prefill_cost(model, 20), prefill_cost(before, 20)
    assert whole["cache_bytes"] == 5 * 20 * (10 + 4) * 4 and own["cache_bytes"] == 4 * 20 * (10 + 4) * 4
    assert own["flops"] < whole["flops"]


@every_kind
def test_saved_loaded_and_trained(kind, ids, tmp_path):
    before = teacher(kind)
    model = convert_swiftkv(before, first=2, group=2)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    new = {name: p for name, p in model.named_parameters() if p.requires_grad}
    student = Observed(model, options={"use_cache": False})
    objective = knowledge_preserved(student, temperature=2.0, hidden_weight=1.0, hidden_layer=-2)
    optimizer = torch.optim.Adam(new.values(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective({"input_ids": ids})
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in frozen.items())
    model.save_pretrained(tmp_path)
    again = load_swiftkv(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == new.keys()
    with original(again), pytest.raises(ModelError, match="saved without the original"):
        again(ids)


def test_one_clear_line_for_other_attentions():
    class StrangeAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = torch.nn.Linear(4, 12)

    with pytest.raises(ModelError, match=r"StrangeAttention has none of the projections.*Phi-3"):
        projections(StrangeAttention(), 1)
