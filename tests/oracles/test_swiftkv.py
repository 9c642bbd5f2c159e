"""SwiftKV (card 182): the surgery against equations, prompts that stop half-way, what they cost, and the loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.models.swiftkv import (
    Switched,
    cache_bytes,
    cache_share,
    convert_swiftkv,
    is_swiftkv,
    load_swiftkv,
    original,
    prefill_cost,
)
from stillhouse.objectives.swiftkv import knowledge_preserved
from stillhouse.systems.language.swiftkv import SwiftKV

KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
groups = pytest.mark.parametrize("group", [1, 2, 3])


def teacher(kind: str = "llama", *, layers: int = 5, **changes: Any) -> Any:
    """A small model of double precision with strong opinions."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    made = model(config(**sizes, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:  # ones would hide a norm that is not used
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))


# -- the surgery ----------------------------------------------------------------------------------------------------


@every_kind
@groups
@torch.no_grad()
def test_with_the_switch_off_it_is_the_original(kind, group, ids):
    before = teacher(kind)
    model = convert_swiftkv(before, first=2, group=group)
    with original(model):
        assert torch.equal(model(ids).logits, before(ids).logits)
    assert not torch.allclose(model(ids).logits, before(ids).logits, atol=1e-2)


@torch.no_grad()
def test_when_all_layers_keep_their_own_nothing_changes(ids):
    before = teacher()
    assert torch.equal(convert_swiftkv(before, first=5, group=2)(ids).logits, before(ids).logits)


@torch.no_grad()
def test_the_last_layer_alone_is_exact_at_the_beginning(ids):
    """z is then what the layer's own norm gives, and the projections are its own."""
    before = teacher()
    torch.testing.assert_close(convert_swiftkv(before, first=4)(ids).logits, before(ids).logits)


@every_kind
@torch.no_grad()
def test_layers_that_add_nothing_do_not_care_whose_keys_they_read(kind, ids):
    before = teacher(kind)
    for layer in before.model.layers[2:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    torch.testing.assert_close(convert_swiftkv(before, first=2, group=2)(ids).logits, before(ids).logits)


@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_the_forward_by_hand(group, ids):
    """Layer by layer, from the equations."""
    before, first = teacher(), 2
    model = convert_swiftkv(before, first=first, group=group)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    decoder = before.model
    x = decoder.embed_tokens(ids)
    cos, sin = decoder.rotary_emb(x, torch.arange(12)[None])
    causal = torch.full((12, 12), -torch.inf, dtype=x.dtype).triu(1)

    def heads(flat: torch.Tensor) -> torch.Tensor:
        return flat.view(2, 12, -1, 8).transpose(1, 2)

    z = None
    for index, layer in enumerate(decoder.layers):
        attention, own = layer.self_attn, model.model.layers[index].self_attn
        u = layer.input_layernorm(x)
        if index < first:
            q, k, v = (getattr(attention, f"{part}_proj")(u) for part in "qkv")
        else:
            z = model.swiftkv.norm(x) if index == first else z
            leader = model.model.layers[first + (index - first) // group * group].self_attn
            q, k, v = own.q_proj.new(u), leader.k_proj.new(z), leader.v_proj.new(z)
        query, key = apply_rotary_pos_emb(heads(q), heads(k), cos, sin)
        key, value = key.repeat_interleave(2, 1), heads(v).repeat_interleave(2, 1)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(8) + causal).softmax(-1)
        x = x + attention.o_proj((weights @ value).transpose(1, 2).reshape(2, 12, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(model(ids).logits, before.lm_head(decoder.norm(x)))


def test_what_the_new_parts_begin_with():
    before = teacher("qwen3")
    model = convert_swiftkv(before, first=1, group=3)
    own, layers = before.model.layers, model.model.layers
    assert torch.equal(model.swiftkv.norm.weight, own[1].input_layernorm.weight)
    for index in range(1, 5):
        assert torch.equal(layers[index].self_attn.q_proj.new.weight, own[index].self_attn.q_proj.weight)
    mean = sum(own[index].self_attn.k_proj.weight for index in (1, 2, 3)) / 3
    torch.testing.assert_close(layers[1].self_attn.k_proj.new.weight, mean)
    mean = sum(own[index].self_attn.k_norm.weight for index in (1, 2, 3)) / 3
    torch.testing.assert_close(layers[1].self_attn.k_norm.new.weight, mean)
    assert layers[2].self_attn.k_proj.new is None and layers[3].self_attn.v_proj.new is None
    torch.testing.assert_close(layers[4].self_attn.v_proj.new.weight, own[4].self_attn.v_proj.weight)  # a group of one


def test_only_the_new_parts_learn_and_the_rest_is_one_copy():
    before = teacher()
    model = convert_swiftkv(before, first=2, group=2)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = "model.layers.{}.self_attn.{}_proj.new.weight"
    expected = {attention.format(index, "q") for index in (2, 3, 4)}
    expected |= {attention.format(index, part) for index in (2, 4) for part in "kv"}
    assert learning == {"swiftkv.norm.weight", *expected}
    theirs = {parameter.data_ptr() for parameter in before.parameters()}
    frozen = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen.values()) == theirs


@torch.no_grad()
def test_a_copy_has_a_switch_of_its_own(ids):
    model = convert_swiftkv(teacher(), first=2)
    twin = copy.deepcopy(model)
    expected = model(ids).logits
    with original(twin):
        assert not torch.allclose(twin(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(twin(ids).logits, expected)


@torch.no_grad()
def test_it_is_causal(ids):
    model = convert_swiftkv(teacher(), first=2, group=3)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    difference = (model(changed).logits - model(ids).logits).abs().amax(-1)
    assert difference[:, :7].max() == 0 and difference[:, 7:].min() > 0


# -- prompts that stop half-way -------------------------------------------------------------------------------------


@every_kind
@groups
@torch.no_grad()
def test_an_early_stop_gives_what_the_full_forward_gives(kind, group, ids):
    model = convert_swiftkv(teacher(kind), first=2, group=group)
    whole = model(ids, use_cache=False).logits
    found = model(ids, use_cache=True, logits_to_keep=1)
    torch.testing.assert_close(found.logits, whole[:, -1:], rtol=1e-9, atol=1e-9)
    kept = model(ids, use_cache=True).past_key_values  # all layers, all tokens
    for fast, slow in zip(found.past_key_values.layers, kept.layers, strict=True):
        assert (fast.keys is None) == (slow.keys is None)
        if fast.keys is not None:
            torch.testing.assert_close(fast.keys, slow.keys)
            torch.testing.assert_close(fast.values, slow.values)


@torch.no_grad()
def test_prompt_tokens_enter_no_upper_layer(ids):
    """Counted on the modules: the feed-forward of an upper layer sees the last token only."""
    model, seen = convert_swiftkv(teacher(), first=2, group=2), {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _m, args, _o, index=index: seen.setdefault(index, []).append(args[0].shape[1])
        )
    model(ids, use_cache=True, logits_to_keep=1)
    assert {index: sum(sizes) for index, sizes in seen.items()} == {0: 12, 1: 12, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize(("kind", "group"), [("llama", 1), ("llama", 3), ("qwen3", 2), ("mistral", 2)])
@torch.no_grad()
def test_generation_with_padding_and_a_merged_cache(kind, group, ids):
    model = convert_swiftkv(teacher(kind), first=2, group=group)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = ids
    for _ in range(6):  # everything again at each token, without a cache
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(text, attention_mask=mask, position_ids=places, use_cache=False).logits
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(found, text)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids), use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(embedded, model(ids, use_cache=False).logits[:, -1:])


@torch.no_grad()
def test_beams_and_chunks_of_a_prompt(ids):
    model = convert_swiftkv(teacher(), first=2, group=2)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=ids, **options), model.generate(input_ids=ids, use_cache=False, **options)
    )
    begun = model(ids[:, :5], use_cache=True, logits_to_keep=1).past_key_values
    rest = model(ids[:, 5:], past_key_values=begun, use_cache=True)
    torch.testing.assert_close(rest.logits, model(ids, use_cache=False).logits[:, 5:])


# -- what it costs --------------------------------------------------------------------------------------------------


def test_the_cards_shares_of_the_cache():
    assert [cache_share(32, 16, group) for group in (1, 2, 4, 16)] == [1.0, 0.75, 0.625, 17 / 32]
    assert 1 - cache_share(32, 16, 2) * 0.5 == 0.625  # the abstract's saving, with a cache of half the bits


@groups
def test_counted_costs_are_those_computed_by_hand(group):
    before, first, tokens = teacher(), 2, 20
    model = convert_swiftkv(before, first=first, group=group)
    own, whole = prefill_cost(model, tokens), prefill_cost(before, tokens)
    assert whole["cache_bytes"] == 5 * 2 * tokens * 16 * 8  # layers, pair, tokens, width of two heads, double
    assert own["cache_bytes"] / whole["cache_bytes"] == pytest.approx(cache_share(5, first, group))

    def layer(read: int, seen: int) -> int:
        """A layer on ``read`` tokens that attend to ``seen``: projections, attention, feed-forward; without K and V."""
        return 2 * read * (2 * 32 * 32 + 3 * 32 * 48) + 2 * 2 * read * seen * 32

    pair, head = 2 * 2 * 32 * 16, 2 * 32 * 50
    expected = 5 * (layer(tokens, tokens) + tokens * pair) + head
    assert whole["flops"] == expected
    lower = first * (layer(tokens - 1, tokens - 1) + layer(1, tokens) + tokens * pair)
    upper = (5 - first) * layer(1, tokens) + -(-(5 - first) // group) * tokens * pair
    assert own["flops"] == lower + upper + head


def test_the_share_at_the_size_of_an_8b_llama():
    """From its shapes: half of the layers, and keys and values of the upper half."""
    width, inner, kv = 4096, 14336, 1024
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner
    assert (16 * layer + 16 * 2 * width * kv) / (32 * layer) == pytest.approx(0.52, abs=0.005)


def test_bytes_of_an_empty_cache(ids):
    from transformers import DynamicCache

    assert cache_bytes(DynamicCache()) == 0


# -- the loss -------------------------------------------------------------------------------------------------------


def loss_of(model: Any, batch: Any, **changes: Any) -> Any:
    options = {"temperature": 2.0, "hidden_weight": 1.0, "hidden_layer": -2, **changes}
    student = Observed(model, options={"use_cache": False})
    return knowledge_preserved(student, **options)(batch)


def by_hand(model: Any, before: Any, batch: Any, *, temperature: float, weight: float, layer: int) -> torch.Tensor:
    own, theirs = (one(batch["input_ids"], output_hidden_states=True, use_cache=False) for one in (model, before))
    log_q, log_p = ((one.logits[:, :-1] / temperature).log_softmax(-1) for one in (own, theirs))
    row = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    mask = batch.get("loss_mask", torch.ones_like(batch["input_ids"]))[:, 1:]
    hidden = (own.hidden_states[layer] - theirs.hidden_states[layer]).square().mean()
    return (row * mask).sum() / mask.numel() + weight * hidden


@pytest.mark.parametrize(("temperature", "weight", "layer"), [(2.0, 1.0, -2), (1.0, 0.5, -1), (4.0, 3.0, -3)])
def test_the_loss_by_hand_and_its_gradient(temperature, weight, layer, ids):
    before = teacher().float()
    model = convert_swiftkv(before, first=2, group=2)
    mask = torch.zeros_like(ids)
    mask[:, 8:] = 1
    options = {"temperature": temperature, "hidden_weight": weight, "hidden_layer": layer}
    for batch in ({"input_ids": ids}, {"input_ids": ids, "loss_mask": mask}):
        model.zero_grad()
        loss = loss_of(model, batch, **options)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        expected = by_hand(model, before, batch, temperature=temperature, weight=weight, layer=layer)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_masked_positions_count_as_zeros(ids):
    """Half of the positions masked: not the mean of the rest, but half of it."""
    model, mask = convert_swiftkv(teacher(), first=2), torch.zeros_like(ids)
    mask[0] = 1
    half = loss_of(model, {"input_ids": ids, "loss_mask": mask}, hidden_weight=0.0)
    alone = loss_of(model, {"input_ids": ids[:1]}, hidden_weight=0.0)
    torch.testing.assert_close(half, alone / 2)


def test_nothing_is_lost_where_nothing_has_changed(ids):
    assert loss_of(convert_swiftkv(teacher(), first=5), {"input_ids": ids}).item() == 0


@torch.no_grad()
def test_at_a_high_temperature_it_is_the_squared_difference_of_centred_logits(ids):
    before = teacher()
    model = convert_swiftkv(before, first=2)
    difference = (model(ids).logits - before(ids).logits)[:, :-1]
    centred = difference - difference.mean(-1, keepdim=True)
    expected = centred.square().sum(-1).mean() / (2 * 50)
    found = loss_of(model, {"input_ids": ids}, temperature=3e3, hidden_weight=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_training_moves_the_new_parts_only_and_towards_the_original(ids):
    before = teacher()
    model = convert_swiftkv(before, first=1, group=2)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    student = Observed(model, options={"use_cache": False})
    objective = knowledge_preserved(student, temperature=2.0, hidden_weight=1.0, hidden_layer=-2)
    player = Player("student", student, objective, optimizer=adamw(1e-2, weight_decay=0.1))
    optimizer = torch.optim.Adam(player.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective({"input_ids": ids})
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in frozen.items())
    assert model.swiftkv.on and model.swiftkv.z is None  # nothing of a forward is left


# -- saved, loaded, refused -----------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_saved_and_loaded(kind, ids, tmp_path):
    model = convert_swiftkv(teacher(kind), first=2, group=2)
    model.save_pretrained(tmp_path)
    assert is_swiftkv(tmp_path) and model.config.swiftkv["original"]
    again = load_swiftkv(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (again, model)]
    unused = sum(
        p.numel()
        for part in model.modules()
        if isinstance(part, Switched)
        for p in part.original.parameters()  # type: ignore[union-attr]
    )
    assert sizes[1] - sizes[0] == unused > 0
    learning = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (again, model)]
    assert learning[0] == learning[1]
    with original(again), pytest.raises(ModelError, match="saved without the original"):
        again(ids)


def test_what_is_refused(tmp_path):
    before = teacher()
    with pytest.raises(ModelError, match="first must be from 1 to 5"):
        convert_swiftkv(before, first=6)
    with pytest.raises(ModelError, match="already"):
        convert_swiftkv(convert_swiftkv(before, first=2), first=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match="GPT2Attention has none of the projections"):
        convert_swiftkv(gpt2, first=1)
    mixed = teacher("qwen2", layer_types=["full_attention"] * 4 + ["sliding_attention"], sliding_window=4)
    with pytest.raises(ModelError, match="different kinds"):
        convert_swiftkv(mixed, first=2)
    with pytest.raises(ModelError, match="no SwiftKV model"):
        load_swiftkv(tmp_path)
    with pytest.raises(ConfigError, match="hidden_layer=-7"):
        loss_of(convert_swiftkv(before, first=2), {"input_ids": torch.ones(1, 3, dtype=torch.long)}, hidden_layer=-7)


def test_the_papers_values():
    system = SwiftKV()
    assert (system.temperature, system.hidden_weight, system.hidden_layer, system.group) == (2.0, 1.0, -2, 1)
    assert (system.lr, system.weight_decay, system.warmup, system.beta2) == (2e-4, 0.0, 0.05, 0.999)
    assert (system.window, system.epochs) == (8192, 1.0)
