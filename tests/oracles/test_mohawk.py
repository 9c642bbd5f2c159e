"""MOHAWK (card 131): the mixer in its three forms, the losses by hand, layers that do not hear each other."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.losses.matrices import frobenius_distance, token_distance
from stillhouse.models.conversion import LayerByLayer, attention_paths, convert, load_converted
from stillhouse.models.state_space import (
    ShortConvolution,
    StateSpaceMixer,
    inherit_attention,
    log_decay,
    mixing_matrix,
    scan,
)
from stillhouse.objectives.layerwise import eager_attention, hidden_alignment, matrix_orientation, observe_layers
from stillhouse.systems.language.mohawk import MOHAWK


def drawn(T: int, H: int, N: int, P: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, B, C, log alpha of two sequences."""
    g = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(2, T, H, width, generator=g, dtype=torch.float64) for width in (P, N, N))
    return x, B, C, log_decay(torch.randn(2, T, H, generator=g, dtype=torch.float64))


def recurrence(x: Tensor, B: Tensor, C: Tensor, log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = alpha_t h_{t-1} + B_t x_t^T; y_t = C_t^T h_t: token by token, as the card has it."""
    h = torch.zeros(x.shape[0], x.shape[2], B.shape[-1], x.shape[-1], dtype=x.dtype)
    ys = []
    for t in range(x.shape[1]):
        h = log_alpha[:, t].exp()[..., None, None] * h + B[:, t, :, :, None] * x[:, t, :, None, :]
        ys.append((C[:, t, :, :, None] * h).sum(-2))
    return torch.stack(ys, 1), h


# -- the mixing matrix ----------------------------------------------------------------------------------------------


@given(T=st.integers(1, 13), N=st.integers(1, 5), chunk=st.integers(1, 15), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_matrix_recurrence_and_chunks_agree(T, N, chunk, seed):
    x, B, C, log_alpha = drawn(T, 3, N, 4, seed)
    expected, state = recurrence(x, B, C, log_alpha)
    torch.testing.assert_close(torch.einsum("bhij,bjhp->bihp", mixing_matrix(C, B, log_alpha), x), expected)
    y, last = scan(x, B, C, log_alpha, chunk=chunk)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, state)


def test_a_scan_goes_on_from_a_state():
    x, B, C, log_alpha = drawn(11, 2, 3, 4)
    whole, _ = scan(x, B, C, log_alpha, chunk=4)
    _, state = scan(x[:, :6], B[:, :6], C[:, :6], log_alpha[:, :6], chunk=4)
    rest, _ = scan(x[:, 6:], B[:, 6:], C[:, 6:], log_alpha[:, 6:], chunk=4, state_BHNP=state)
    torch.testing.assert_close(rest, whole[:, 6:])


def test_three_tokens_by_hand():
    """alpha = (., 0.5, 0.25), B = C = 1; the first alpha appears nowhere."""
    one = torch.ones(1, 3, 1, 1)
    for first in (0.1, 0.9):
        log_alpha = torch.tensor([first, 0.5, 0.25]).log().view(1, 3, 1)
        expected = torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [0.125, 0.25, 1]])
        torch.testing.assert_close(mixing_matrix(one, one, log_alpha)[0, 0], expected)
    skip = mixing_matrix(one, one, log_alpha, torch.tensor([2.0]))[0, 0]
    torch.testing.assert_close(skip, expected + 2 * torch.eye(3))


def test_without_decay_it_is_the_cumulative_sum():
    x = torch.randn(1, 9, 1, 4)
    one, zero = torch.ones(1, 9, 1, 1), torch.zeros(1, 9, 1)
    torch.testing.assert_close(mixing_matrix(one, one, zero)[0, 0], torch.ones(9, 9).tril())
    torch.testing.assert_close(scan(x, one, one, zero, chunk=4)[0], x.cumsum(1))


@pytest.mark.parametrize("state_size", [1, 3])
def test_blocks_below_the_diagonal_have_the_rank_of_the_state(state_size):
    _, B, C, log_alpha = drawn(12, 2, state_size, 1)
    M = mixing_matrix(C, B, log_alpha)
    for split in range(1, 12):
        block = M[..., split:, :split]
        assert int(torch.linalg.matrix_rank(block, rtol=1e-9).max()) <= state_size
    assert int(torch.linalg.matrix_rank(M[0, 0])) == 12  # the whole has full rank: it is no low-rank attention
    assert int(torch.linalg.matrix_rank(M[0, 0, 6:, :6], rtol=1e-9)) == state_size
    assert M.triu(1).abs().max() == 0


@given(st.floats(-30, 30))
def test_the_decay(a):
    found = log_decay(torch.tensor(a, dtype=torch.float64)).exp().item()
    assert found == pytest.approx(math.exp(-math.log1p(math.exp(a))), rel=1e-9)
    assert found == pytest.approx(1 / (1 + math.exp(a)), rel=1e-9)


def test_strong_decay_over_long_sequences_gives_numbers():
    """Exponents above the diagonal would overflow; their gradients too."""
    one = torch.ones(1, 512, 1, 1)
    log_alpha = torch.full((1, 512, 1), -20.0, requires_grad=True)
    M = mixing_matrix(one, one, log_alpha)
    M.sum().backward()
    assert torch.isfinite(M).all() and torch.isfinite(log_alpha.grad).all()


# -- the mixer ------------------------------------------------------------------------------------------------------


def mixer(seed: int = 0, **changes: int) -> StateSpaceMixer:
    torch.manual_seed(seed)
    return StateSpaceMixer(12, **{"heads": 3, "head_dim": 4, "state_size": 5, "chunk": 4, **changes})


def test_a_new_mixer_is_a_plain_one():
    """Convolutions are the identity, the gate is exactly 1: out = W_o M x."""
    module, u = mixer(), torch.randn(2, 10, 12)
    torch.testing.assert_close(ShortConvolution(12, 4)(u), u)
    x = module.x_proj(u).view(2, 10, 3, 4)
    expected = module.out_proj(torch.einsum("bhij,bjhp->bihp", module.matrix(u), x).flatten(2))
    torch.testing.assert_close(module(u)[0], expected)
    assert torch.equal(module.D, torch.ones(3))
    without_skip = module.matrix(u) - torch.eye(10)
    assert without_skip.diagonal(dim1=-2, dim2=-1).abs().max() > 0.1


def test_the_whole_mixer_with_everything_moved():
    """Convolution, gate and skip away from their beginnings, against loops."""
    module = mixer()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.randn(1, 7, 12)

    def convolved(conv: ShortConvolution, v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for t in range(7):
            for back in range(4):
                if t - back >= 0:
                    out[:, t] += conv.weight[:, 0, 3 - back] * v[:, t - back]
        return out + conv.bias

    x = convolved(module.x_conv, module.x_proj(u)).view(1, 7, 3, 4)
    B = convolved(module.b_conv, module.b_proj(u)).view(1, 7, 3, 5)
    C = convolved(module.c_conv, module.c_proj(u)).view(1, 7, 3, 5)
    y, _ = recurrence(x, B, C, torch.log(torch.sigmoid(-module.a_proj(u))))
    y = y + module.D[:, None] * x
    z = module.z_proj(u) + module.z_bias
    expected = module.out_proj(y.flatten(2) * z * torch.sigmoid(z))
    torch.testing.assert_close(module(u)[0], expected, rtol=1e-4, atol=1e-5)


def test_it_is_causal_and_never_mixes_sequences():
    module, u = mixer(), torch.randn(2, 9, 12)
    changed = u.clone()
    changed[0, 5] += 1
    difference = (module(changed)[0] - module(u)[0]).abs().amax(-1)
    assert difference[0, :5].max() == 0 and difference[1].max() == 0
    assert (difference[0, 5:] > 0).all()


def test_padding_leaves_no_trace():
    module, u = mixer(), torch.randn(1, 6, 12)
    padded = torch.cat([torch.randn(1, 3, 12), u], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~visible, -torch.inf)
    for form in (mask, visible[None, None], additive):
        torch.testing.assert_close(module(padded, attention_mask=form)[0][:, 3:], module(u)[0])
    assert not torch.allclose(module(padded)[0][:, 3:], module(u)[0])
    assert module.matrix(padded, mask)[..., 3:, :3].abs().max() == 0


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
def test_piece_by_piece_it_is_the_whole(pieces):
    """With convolution, gate and skip away from their beginnings; a state that forgets nothing and repeats nothing."""
    module, u = mixer(), torch.randn(2, 9, 12)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    cache, found = DynamicCache(), []
    for piece in u.split(pieces, 1):
        found.append(module(piece, past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(found, 1), module(u)[0], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 9
    alone = module(u[:, -1:])[0]  # without what came before it is another output
    assert not torch.allclose(alone, module(u)[0][:, -1:], atol=1e-3)


def test_the_state_against_the_recurrence_and_of_one_size():
    module, u = mixer(), torch.randn(1, 7, 12)
    cache, sizes = DynamicCache(), []
    for token in u.split(1, 1):
        module(token, past_key_values=cache)
        layer = cache.layers[0]
        sizes.append(sum(t.numel() for t in (layer.state, *layer.tails.values())))
    x, B, C = (p(u).view(1, 7, 3, -1) for p in (module.x_proj, module.b_proj, module.c_proj))
    _, h = recurrence(x, B, C, torch.log(torch.sigmoid(-module.a_proj(u))))
    torch.testing.assert_close(layer.state, h)
    assert set(sizes) == {3 * 5 * 4 + 3 * (12 + 15 + 15)}  # H N P, and three inputs of x, B and C


def test_beams_take_their_states_along():
    module, u = mixer(), torch.randn(3, 6, 12)
    cache = DynamicCache()
    module(u[:, :5], past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    found = module(u[[2, 2, 0], 5:], past_key_values=cache)[0]
    torch.testing.assert_close(found, module(u)[0][[2, 2, 0], 5:], rtol=1e-4, atol=1e-5)
    cache.reset()
    torch.testing.assert_close(module(u, past_key_values=cache)[0], module(u)[0])


def test_a_cache_of_something_else_is_refused():
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ModelError, match="empty DynamicCache"):
        mixer()(torch.randn(1, 2, 12), past_key_values=filled)
    used = DynamicCache()
    mixer()(torch.randn(1, 2, 12), past_key_values=used)
    with pytest.raises(ModelError, match="cannot take tokens back"):
        used.crop(-1)


def test_inherited_projections():
    """W_V -> x and W_O -> out: with M the attention's matrix instead of its own, the mixer would be the attention."""
    torch.manual_seed(0)
    module = mixer(state_size=4)
    q, v, o = torch.nn.Linear(12, 12), torch.nn.Linear(12, 4), torch.nn.Linear(12, 12)
    inherit_attention(module, value=v, output=o, query=q, key=v)
    u = torch.randn(1, 5, 12)
    torch.testing.assert_close(module.x_proj(u), (u @ v.weight.T).repeat(1, 1, 3))  # one value head for three
    torch.testing.assert_close(module.out_proj.weight, o.weight)
    scores = torch.einsum("bihn,bjhn->bhij", *(p(u).view(1, 5, 3, 4) for p in (module.c_proj, module.b_proj)))
    query, key = (u @ q.weight.T).view(1, 5, 3, 4), (u @ v.weight.T).view(1, 5, 1, 4)
    torch.testing.assert_close(scores, torch.einsum("bihn,bjkn->bhij", query, key) / 2)
    assert module.D.abs().max() == 0
    with pytest.raises(ModelError, match="state_size"):
        inherit_attention(mixer(state_size=5), value=v, output=o, query=q, key=v)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_the_card_s_distance():
    """A pair of 2 x 2 matrices that differ by [[0, 0], [3, 4]] is 5 apart; a mean over heads and sequences."""
    A = torch.randn(1, 2, 2, 2)
    M = A.clone()
    M[0, 0] += torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert frobenius_distance(M, A).item() == pytest.approx(5 / 2)  # the other head is 0 apart
    assert frobenius_distance(M, A, torch.tensor([[1, 0]])).item() == 0  # the second row is padding
    assert frobenius_distance(M[:, :1], A[:, :1]).item() == pytest.approx(5)


def test_hidden_distance_by_hand():
    student, teacher = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
    assert token_distance(student, teacher).item() == pytest.approx(3)
    assert token_distance(student, teacher, torch.tensor([[1, 0]])).item() == pytest.approx(5)


def test_gradients_exist_where_nothing_is_left_to_match():
    M = torch.randn(1, 1, 3, 3, requires_grad=True)
    frobenius_distance(M, M.detach().clone()).backward()
    assert torch.isfinite(M.grad).all()


def fitted(form: str, A: Tensor, rank: int) -> float:
    """What is left of ||M - A|| / ||A|| after fitting one form of M to a causal matrix, by gradient."""
    torch.manual_seed(0)
    T = len(A)
    left, right = (torch.nn.Parameter(torch.randn(1, T, 1, rank) / rank**0.5) for _ in range(2))
    decay, taps = torch.nn.Parameter(torch.zeros(1, T, 1)), torch.nn.Parameter(torch.zeros(T))
    index = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)

    def M() -> Tensor:
        if form == "toeplitz":
            return taps[index].tril()
        log_alpha = log_decay(decay) if form == "semiseparable" else torch.zeros_like(decay)
        return mixing_matrix(left, right, log_alpha)[0, 0]

    optimizer = torch.optim.Adam([left, right, decay, taps], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        frobenius_distance(M()[None, None], A[None, None]).backward()
        optimizer.step()
    return float((M() - A).norm().detach() / A.norm())


def test_semiseparable_matrices_fit_attention_best():
    """The card's ordering, on the causal maps of random attention with a preference for what is near."""
    torch.manual_seed(1)
    T = 16
    scores = torch.randn(T, 4) @ torch.randn(4, T) / 2 + 0.3 * torch.arange(T)
    A = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    semiseparable, low_rank, toeplitz = (fitted(form, A, 4) for form in ("semiseparable", "low rank", "toeplitz"))
    assert semiseparable < low_rank < toeplitz


# -- conversion -----------------------------------------------------------------------------------------------------


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHER = {"vocab_size": 40, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def decoder(family: str = "llama") -> LlamaForCausalLM:
    torch.manual_seed(0)
    if family == "phi":
        return PhiForCausalLM(PhiConfig(**SIZES, **OTHER)).eval()
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    return model(config(**SIZES, **OTHER, num_key_value_heads=2)).eval()


def ids(T: int = 10) -> Tensor:
    return torch.randint(3, 40, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_all_but_attention_is_carried_over(family, tmp_path):
    teacher = decoder(family)
    student = convert(teacher, state_size=4, attention_layers=[-1], inherit="all")
    before, after = teacher.state_dict(), student.state_dict()
    paths = attention_paths(teacher)
    for name, tensor in before.items():
        if not name.startswith((paths[0] + ".", paths[1] + ".")):
            assert torch.equal(after[name], tensor), name
    assert [type(student.get_submodule(path)).__name__ for path in paths[:2]] == ["StateSpaceMixer"] * 2
    assert type(student.get_submodule(paths[2])) is type(teacher.get_submodule(paths[2]))
    assert not torch.allclose(student(ids()).logits, teacher(ids()).logits)
    with torch.no_grad():  # the teacher is left alone
        student.get_submodule(paths[0]).out_proj.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder(family).state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_saved_loaded_and_generating(family, tmp_path):
    student = convert(decoder(family), state_size=8, attention_layers=[1])
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"stillhouse-{family}"
    again, auto = load_converted(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.training
    for other in (again, auto):
        assert torch.equal(other(ids()).logits, student(ids()).logits)
    written = auto.generate(ids()[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert written.shape == (1, 16)
    greedy = ids()[:1]
    for _ in range(6):
        logits = student(greedy).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end yet
        greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, greedy)
    reread = auto.generate(ids()[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(written, reread) and auto.generation_config.use_cache
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids()], 1)
    mask = (padded > 0).long()
    found = auto(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    torch.testing.assert_close(found, student(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
@pytest.mark.parametrize("attention_layers", [[], [0], [1]])
def test_token_by_token_is_the_full_forward(family, attention_layers, tmp_path):
    """After saving and loading, as a hybrid or not, with and without padding before the text."""
    convert(decoder(family), state_size=8, attention_layers=attention_layers).save_pretrained(tmp_path)
    student = load_converted(tmp_path)
    text = ids(12)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        positions = None if attention_mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        whole = student(text, attention_mask=attention_mask, position_ids=positions, use_cache=False).logits
        past, found = None, []
        for start, end in ((0, 5), *((t, t + 1) for t in range(5, 12))):
            step = student(
                text[:, start:end],
                attention_mask=None if attention_mask is None else mask[:, :end],
                position_ids=None if positions is None else positions[:, start:end],
                past_key_values=past,
                use_cache=True,
            )
            past = step.past_key_values
            found.append(step.logits)
        seen = mask.bool() if attention_mask is not None else torch.ones_like(mask).bool()
        torch.testing.assert_close(torch.cat(found, 1)[seen], whole[seen], rtol=1e-4, atol=1e-5)
    kinds = ["DynamicLayer" if n in attention_layers else "StateLayer" for n in range(3)]
    assert [type(layer).__name__ for layer in past.layers] == kinds


def test_beams_and_batches_generate_as_without_a_cache():
    student = convert(decoder(), state_size=8, attention_layers=[1])
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(student.generate(ids(), **options), student.generate(ids(), use_cache=False, **options))


def test_what_cannot_be_converted(tmp_path):
    teacher = decoder()
    for layers in ([5], [0, 0], [0, 1, 2]):
        with pytest.raises(ModelError, match="attention_layers"):
            convert(teacher, attention_layers=layers)
    with pytest.raises(ModelError, match="already"):
        convert(convert(teacher))
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no model with replaced attention"):
        load_converted(tmp_path)


# -- the stages -----------------------------------------------------------------------------------------------------


def observed(give: str, layers: list[int] | None = None, window: int | None = None):  # type: ignore[no-untyped-def]
    teacher = decoder()
    student = convert(teacher, state_size=4)
    seen = Observed(teacher, frozen=True, options={"use_cache": False})
    model, ours, theirs = observe_layers(student, layers or [0, 1, 2], seen, give=give, window=window)  # type: ignore[arg-type]
    return teacher, student, model, ours, theirs


def test_layer_inputs_are_the_teacher_s():
    """The signals against the teacher's own hidden states and maps, and mixers called by hand."""
    teacher, student, _, ours, theirs = observed("matrix")
    with eager_attention(teacher):
        told = teacher(ids(), output_attentions=True, output_hidden_states=True)
    batch = {"input_ids": ids()}
    for n in range(3):
        layer = student.model.layers[n]
        u = layer.input_layernorm(told.hidden_states[n])
        torch.testing.assert_close(ours[n](batch), layer.self_attn.matrix(u))
        torch.testing.assert_close(theirs[n](batch), told.attentions[n])
    assert teacher.config._attn_implementation != "eager"  # only while maps are wanted
    expected = sum(
        (layer.self_attn.matrix(layer.input_layernorm(h)) - A).flatten(2).norm(dim=-1).mean()
        for layer, h, A in zip(student.model.layers, told.hidden_states, told.attentions, strict=False)
    )
    torch.testing.assert_close(matrix_orientation(ours, theirs)(batch), expected)


@pytest.mark.parametrize("give", ["mixer", "block"])
def test_hidden_alignment_against_hooks(give):
    teacher, student, _, ours, theirs = observed(give)
    told = teacher(ids(), output_hidden_states=True).hidden_states
    batch = {"input_ids": ids()}
    for n, layer in enumerate(student.model.layers):
        mixed = layer.self_attn(layer.input_layernorm(told[n]))[0]
        expected = mixed if give == "mixer" else told[n] + mixed
        if give == "block":
            expected = expected + layer.mlp(layer.post_attention_layernorm(expected))
        torch.testing.assert_close(ours[n](batch), expected)
    if give == "block":
        torch.testing.assert_close(theirs[0](batch), told[1])
    loss = hidden_alignment(ours, theirs)(batch)
    by_hand = sum((ours[n](batch) - theirs[n](batch)).norm(dim=-1).mean() for n in range(3))
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize(("give", "match"), [("matrix", matrix_orientation), ("block", hidden_alignment)])
def test_a_layer_hears_nothing_of_another_s_loss(give, match):
    _, student, _, ours, theirs = observed(give)
    match({1: ours[1]}, {1: theirs[1]})({"input_ids": ids()}).backward()
    moved = {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"1"}


def test_stage_one_reaches_what_forms_the_matrix_and_nothing_else():
    _, student, _, ours, theirs = observed("matrix")
    matrix_orientation(ours, theirs)({"input_ids": ids()}).backward()
    module = student.model.layers[0].self_attn
    moved = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(StateSpaceMixer.IN_MATRIX)


def test_a_teacher_of_the_student_s_own_kind_is_matched_exactly():
    """Layers of a converted model on its own inputs: block outputs are its own next hidden states."""
    student = convert(decoder(), state_size=4)
    told = student(ids(), output_hidden_states=True).hidden_states
    outputs = LayerByLayer(student, [0, 1], give="block")({0: told[0], 1: told[1]})
    for n in (0, 1):
        torch.testing.assert_close(outputs[str(n)], told[n + 1])


def test_a_shorter_window_reads_the_beginning():
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    _, _, _, ours, theirs = observed("matrix")
    _, _, _, short, short_theirs = observed("matrix", window=6)
    torch.testing.assert_close(short[1](batch), ours[1](batch)[..., :6, :6])
    torch.testing.assert_close(short_theirs[1](batch), theirs[1](batch)[..., :6, :6])
    loss = matrix_orientation(short, short_theirs)(batch)
    torch.testing.assert_close(loss, matrix_orientation(short, short_theirs)({"input_ids": ids()[:, :6]}))


def test_padded_rows_count_nothing():
    """Right padding, as in windows of conversations: what stands there changes no loss."""
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, 7:] = 0
    for give, match in (("matrix", matrix_orientation), ("mixer", hidden_alignment)):
        _, _, _, ours, theirs = observed(give)
        other = torch.where(mask.bool(), ids(), 5)
        found = [match(ours, theirs)({"input_ids": x, "attention_mask": mask}) for x in (ids(), other)]
        torch.testing.assert_close(*found)


def test_shares_that_leave_nothing_are_refused():
    system = MOHAWK.make(teacher="x", data="y", orientation=0.5, alignment=0.5)
    with pytest.raises(ConfigError, match="leave steps for stage 3"):
        next(iter(system.stages(None)))  # type: ignore[arg-type]


def test_the_embedded_characters_are_the_demo_s_only():
    system = MOHAWK.make(teacher="x", data="y", embedded="characters")
    with pytest.raises(ConfigError, match="give no teacher or data"):
        next(iter(system.stages(None)))  # type: ignore[arg-type]


def test_no_two_experiments_share_the_name_of_an_arm():
    """Runs of a claim lie in folders named by arm and seed: one name must mean one configuration."""
    arms: dict[str, object] = {}
    for claim in MOHAWK.make().claims():
        for name, (_, values) in claim.variants.items():
            assert arms.setdefault(name, values) == values


def test_half_precision_keeps_the_decay_precise():
    """Sums of log alpha over many tokens: in bfloat16 they would be off by whole units."""
    module = mixer(chunk=512).to(torch.bfloat16)
    u = torch.randn(1, 512, 12).to(torch.bfloat16)
    with torch.no_grad():
        module.a_proj.weight.mul_(0.1)
        exact, found = mixer(chunk=512), module(u)[0].float()
        exact.load_state_dict({name: tensor.float() for name, tensor in module.state_dict().items()})
        expected = exact(u.float())[0]
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_teacher_in_half_precision_teaches_a_student_in_full():
    teacher = decoder().to(torch.bfloat16)
    student = convert(decoder(), state_size=4)
    seen = Observed(teacher, frozen=True, options={"use_cache": False})
    for give, match in (("matrix", matrix_orientation), ("block", hidden_alignment)):
        _, ours, theirs = observe_layers(student, [0, 2], seen, give=give)  # type: ignore[arg-type]
        loss = match(ours, theirs)({"input_ids": ids()})
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
