"""The law of the capacity gap (card 112): the fit, the masks, cutting, and the size of MiniMA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MptConfig, Qwen3Config

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Observed
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.linear_divergence import linear_divergence
from stillhouse.metrics.capacity_law import best_teacher, fit_law, recommend_teacher
from stillhouse.models.causal_lm import new_causal_lm, parameter_count
from stillhouse.models.lm_pruning import (
    Kept,
    MaskScores,
    choose,
    groups_of,
    layers_of,
    mask_scores,
    masked,
    ones,
    prune_causal_lm,
    target_config,
)
from stillhouse.models.pruning import prune
from stillhouse.models.scaling import config_parameters
from stillhouse.models.tokenizer_transfer import transplant
from stillhouse.models.tokenizers import train_bpe
from stillhouse.models.vocab_extension import extended_from, merged, with_tokens
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of

# -- the law --------------------------------------------------------------------------------------------------------


def points(*pairs):
    return [best_teacher([teacher], [0.0], student) for student, teacher in pairs]


def test_the_fit_through_the_origin():
    law = fit_law(points((1, 2.5), (2, 5), (4, 10)))
    assert law.k == pytest.approx(2.5) and law.slope == pytest.approx(1)
    assert law.interval == pytest.approx((2.5, 2.5)) and law.slope_interval == pytest.approx((1, 1))
    bent = fit_law(points((1, 3), (2, 4), (4, 9)))
    assert bent.k == pytest.approx((3 + 8 + 36) / 21)
    assert bent.interval[0] < bent.k < bent.interval[1]


def test_one_student_gives_no_interval():
    law = fit_law(points((3, 6)))
    assert (law.k, law.interval, law.slope) == (2, None, None)


def test_the_fit_recovers_k_from_noisy_scores():
    """Card 112: 6 x 8 sizes, S = -(log N_T - log 2.5 N_S)^2 + noise 0.05; k within [2.2, 2.8] in 95 % of draws."""
    students = 10.0 ** np.linspace(6, 8, 6)
    teachers = 10.0 ** np.linspace(6, 9, 8)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        rows = -((np.log(teachers)[None] - np.log(2.5 * students)[:, None]) ** 2) + 0.05 * rng.standard_normal((6, 8))
        found.append(fit_law([best_teacher(teachers, row, n) for row, n in zip(rows, students, strict=True)]))
    assert np.mean([2.2 <= law.k <= 2.8 for law in found]) >= 0.95
    assert np.mean([law.slope_interval[0] <= 1 <= law.slope_interval[1] for law in found]) >= 0.9


def test_a_best_teacher_at_the_edge_is_called_so():
    assert best_teacher([1, 2, 4], [0.1, 0.2, 0.3], 1).at_edge
    inside = best_teacher([1, 2, 4, 8], [0.0, 1.0, 1.0, 0.0], 1)
    assert not inside.at_edge and inside.teacher == pytest.approx(math.sqrt(8))  # between two that are as good
    assert best_teacher([1, 2, 4], [float("nan"), 0.5, 0.2], 1).teacher == 2


def test_the_teacher_nearest_in_logarithm():
    zoo = {"small": 1.0, "near": 4.0, "large": 7.0}
    assert recommend_teacher(2.1, zoo, k=2.5) == "near"  # 5.25: nearer to 4 than to 7 in logarithm as well
    assert recommend_teacher(2.2, zoo, k=2.5) == "large"  # 5.5: nearer to 4 by distance (1.5 = 1.5), to 7 by ratio
    assert recommend_teacher(2.2, zoo, k=0.5) == "small"


# -- importance -----------------------------------------------------------------------------------------------------


def llama(**sizes):
    made = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 4}
    made |= {"num_key_value_heads": 2, "head_dim": 4, "vocab_size": 50, "tie_word_embeddings": False, **sizes}
    return LlamaConfig(**made, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=2)


@pytest.fixture
def model():
    made = new_causal_lm(llama(), seed=0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that every part matters
    return made


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 50, (2, 9), generator=generator)} for _ in range(count)]


def loss_of(model):
    return TokenCrossEntropy(head_of(Observed(model, options={"use_cache": False})))


def test_masks_of_one_change_nothing_and_hooks_are_gone(model):
    batch = batches(1)[0]
    plain = model(**batch).logits
    with masked(model, ones(model)):
        assert torch.equal(model(**batch).logits, plain)
    zeros = MaskScores(*(torch.zeros_like(part) for part in vars(ones(model)).values()))
    with masked(model, zeros):
        assert not torch.allclose(model(**batch).logits, plain)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("part", ["heads", "neurons", "hidden", "layers"])
def test_scores_are_the_derivative_by_the_mask(model, part):
    loss, batch = loss_of(model), batches(1)[0]
    found = getattr(mask_scores(model, loss, [batch]), part)
    place = (1, 2) if found.ndim == 2 else (1,)

    def at(value):
        masks = ones(model)
        getattr(masks, part)[place] = value
        with masked(model, masks), torch.no_grad():
            return float(loss(batch))

    assert float(found[place]) == pytest.approx(abs(at(1.01) - at(0.99)) / 0.02, rel=1e-2)


def test_scores_are_means_of_absolute_values_over_batches(model):
    loss, given = loss_of(model), batches(3)
    each = [mask_scores(model, loss, [batch]).neurons for batch in given]
    torch.testing.assert_close(mask_scores(model, loss, given).neurons, torch.stack(each).mean(0))
    torch.testing.assert_close(mask_scores(model, loss, given, most=2).neurons, torch.stack(each[:2]).mean(0))


def test_a_head_that_writes_nothing_scores_nothing(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 4:8] = 0  # head 1 of heads of 4
        model.model.layers[2].mlp.down_proj.weight[:, 3] = 0
    found = mask_scores(model, loss_of(model), batches())
    assert found.heads[0, 1] == 0 and (found.heads[0, [0, 2, 3]] > 0).all()
    assert found.neurons[2, 3] == 0 and (found.neurons[2] > 0).sum() == 9


def test_normalised_scores_have_norm_one_in_each_layer(model):
    found = mask_scores(model, loss_of(model), batches()).normalised()
    torch.testing.assert_close(found.heads.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found.neurons.norm(dim=1), torch.ones(3))


# -- cutting --------------------------------------------------------------------------------------------------------


def shape(config, **sizes):
    return type(config).from_dict({**config.to_dict(), **sizes})


@pytest.mark.parametrize("kind", ["llama", "qwen3", "tied"])
def test_cutting_heads_and_neurons_is_masking_them(kind):
    config = llama(tie_word_embeddings=kind == "tied", attention_bias=kind == "tied")
    if kind == "qwen3":
        config = Qwen3Config(**{k: v for k, v in llama().to_dict().items() if k not in ("model_type", "layer_types")})
    model = new_causal_lm(config, seed=0).eval()
    scores = mask_scores(model, loss_of(model), batches())
    target = shape(config, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6)
    kept = choose(scores, config, target)
    small = prune_causal_lm(model, target, kept)
    masks = ones(model)
    for layer in range(3):
        masks.heads[layer] = 0
        masks.heads[layer, kept.heads[layer]] = 1
        masks.neurons[layer] = 0
        masks.neurons[layer, kept.neurons[layer]] = 1
    batch = batches(1)[0]
    with masked(model, masks), torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    assert parameter_count(small) == config_parameters(target) < parameter_count(model)
    assert parameter_count(model) == config_parameters(config)  # the teacher stays whole


def test_the_worst_go(model):
    scores = ones(model)
    scores.layers[1] = 0.5
    scores.neurons[0, [0, 7]] = 0
    scores.hidden[[2, 5, 11, 3]] = 0
    scores.heads[2] = torch.tensor([0.1, 0.2, 0.0, 5.0])
    target = shape(model.config, num_hidden_layers=2, intermediate_size=8, hidden_size=8, num_attention_heads=2,
                   num_key_value_heads=1)  # fmt: skip
    kept = choose(scores, model.config, target)
    assert kept.layers.tolist() == [0, 2]
    assert kept.neurons[0].tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert kept.hidden.tolist() == [0, 1, 4, 6, 7, 8, 9, 10]
    assert kept.groups[1].tolist() == [1] and kept.heads[1].tolist() == [2, 3]
    small = prune_causal_lm(model, target, kept)
    old, new = model.model.layers[2], small.model.layers[1]
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[4:8][:, kept.hidden])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[kept.hidden][:, 8:16])
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[kept.neurons[1]][:, kept.hidden])
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight[:, kept.hidden])
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[:, kept.hidden])


def test_a_shape_that_does_not_fit_is_refused(model):
    config = model.config
    with pytest.raises(ModelError, match="hidden_size=16 is more"):
        choose(ones(model), config, shape(config, hidden_size=16))
    with pytest.raises(ModelError, match="head_dim=4"):
        choose(ones(model), config, shape(config, head_dim=2))


def test_a_number_of_parameters_becomes_a_shape_that_can_be_cut():
    config = llama(hidden_size=64, head_dim=16, intermediate_size=160, num_hidden_layers=4)
    wanted = config_parameters(config) // 3
    target = target_config(config, wanted)
    assert target.head_dim == 16 and 0.6 * wanted < config_parameters(target) <= wanted
    choose(ones(new_causal_lm(config, seed=0)), config, target)
    assert target_config(config, "layers=2,hidden_size=32,heads=2").head_dim == 16


def test_the_size_of_minima():
    config = LlamaConfig(vocab_size=32_000, hidden_size=3072, intermediate_size=8192, num_hidden_layers=24,
                         num_attention_heads=24, num_key_value_heads=24, tie_word_embeddings=False)  # fmt: skip
    layer = 4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072
    assert config_parameters(config) == 2 * 32_000 * 3072 + 24 * layer + 3072
    assert config_parameters(config) == pytest.approx(2.91e9, rel=2e-3)


# -- GPT-2 and GPT-NeoX, which fuse queries, keys and values --------------------------------------------------------


def fused(kind, **sizes):
    """Heads of 4 dimensions; biases and norms far from their initial 0 and 1, so that all of them matter."""
    common = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": kind == "gpt2", **sizes}
    if kind == "gpt2":
        made = {"n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": 32, "n_inner": 10, **common}
        config = GPT2Config(**made, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        made = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 10, **common}
        config = GPTNeoXConfig(**made, max_position_embeddings=32, use_parallel_residual=kind == "pythia")
    model = new_causal_lm(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


KINDS = ["gpt2", "pythia", "neox"]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_masks_of_one_change_nothing_and_scores_are_derivatives(kind):
    model, batch = fused(kind), batches(1)[0]
    plain = model(**batch).logits
    with masked(model, ones(model)):
        assert torch.equal(model(**batch).logits, plain)
    loss = loss_of(model)
    found = mask_scores(model, loss, [batch])
    for part, place in (("heads", (1, 2)), ("neurons", (2, 3)), ("hidden", (5,)), ("layers", (1,))):

        def at(value, part=part, place=place):
            masks = ones(model)
            getattr(masks, part)[place] = value
            with masked(model, masks), torch.no_grad():
                return float(loss(batch))

        slope = abs(at(1.01) - at(0.99)) / 0.02
        assert slope > 1e-4 and float(getattr(found, part)[place]) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_a_head_that_writes_nothing_scores_nothing(kind):
    model = fused(kind)
    layout, layers = layers_of(model)
    with torch.no_grad():
        for number, path, dims in ((0, layout.attended, slice(4, 8)), (2, layout.written, slice(3, 4))):
            weight = layers[number].get_submodule(path).weight
            (weight if kind == "gpt2" else weight.T)[dims] = 0
    found = mask_scores(model, loss_of(model), batches())
    assert found.heads[0, 1] == 0 and (found.heads[0, [0, 2, 3]] > 0).all()
    assert found.neurons[2, 3] == 0 and (found.neurons[2] > 0).sum() == 9


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_cutting_heads_and_neurons_is_masking_them(kind):
    """In place: a config of theirs cannot say that there are fewer heads in the same width."""
    model, small = fused(kind), fused(kind)
    keep = {"heads": [torch.tensor(k) for k in ([1, 3], [0, 1], [2])], "neurons": [torch.tensor([0, 4, 9])] * 3}
    masks = ones(model)
    for layer, cuts in enumerate(groups_of(small)[1]):
        for cut in cuts:
            kept = keep["neurons" if cut.unit == "neurons" else "heads"][layer]
            prune(small, cut.group, (kept[:, None] * cut.each + torch.arange(cut.each)).flatten())
        if kind == "gpt2":
            small.transformer.h[layer].attn.split_size = 4 * len(keep["heads"][layer])
        for part in ("heads", "neurons"):
            getattr(masks, part)[layer] = 0
            getattr(masks, part)[layer, keep[part][layer]] = 1
    batch = batches(1)[0]
    with masked(model, masks), torch.no_grad():
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_hidden_dimensions_that_repeat_others_can_be_cut_exactly(kind):
    """A norm's mean and deviation stay when every dimension is there twice and one copy, which nobody reads, leaves."""
    model = fused(kind)
    hidden, _ = groups_of(model)
    layout, blocks = layers_of(model)
    twin = torch.arange(16).view(8, 2)  # dimension 2 i + 1 repeats dimension 2 i
    reads = [*(one.path for one in layout.makes), *layout.inner]
    idle = [block.get_submodule(path) for block in blocks for path in reads]
    with torch.no_grad():
        for member in hidden.members:
            weight = model.get_parameter(member.parameter).movedim(member.dim, 0)
            weight[twin[:, 1]] = weight[twin[:, 0]]
        for module in idle + ([] if kind == "gpt2" else [model.get_output_embeddings()]):
            (module.weight if kind == "gpt2" else module.weight.T)[twin[:, 1]] = 0
        for block in blocks:  # the heads and neurons that leave write nothing
            for path, gone in ((layout.attended, slice(8, 16)), (layout.written, slice(6, 10))):
                weight = block.get_submodule(path).weight
                (weight if kind == "gpt2" else weight.T)[gone] = 0
    target = target_config(model.config, "hidden_size=8,heads=2,intermediate_size=6")
    two, six = torch.arange(2), torch.arange(6)
    small = prune_causal_lm(model, target, Kept(torch.arange(3), twin[:, 0], (two,) * 3, (two,) * 3, (six,) * 3))
    batch = batches(1)[0]
    with torch.no_grad():
        whole = model(**batch).logits / (2 if kind == "gpt2" else 1)  # tied: the output layer reads both copies
        torch.testing.assert_close(small(**batch).logits, whole, atol=1e-5, rtol=1e-5)
    assert parameter_count(small) == config_parameters(target) < parameter_count(model)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_are_sliced_where_the_scores_say(kind):
    model = fused(kind)
    target = target_config(model.config, "layers=2,hidden_size=8,heads=2,intermediate_size=6")
    scores = ones(model)
    scores.layers[1] = 0
    scores.heads[2] = torch.tensor([0.0, 3.0, 0.0, 2.0])
    scores.hidden[::2] = 0
    kept = choose(scores, model.config, target)
    small = prune_causal_lm(model, target, kept)
    layout, old = layers_of(model)
    new = layers_of(small)[1]
    fused_old, fused_new = (layers[place].get_submodule(layout.makes[0].path) for layers, place in ((old, 2), (new, 1)))
    head = torch.arange(4)
    if kind == "gpt2":  # all queries, all keys, all values
        rows = torch.cat([part * 16 + number * 4 + head for part in range(3) for number in (1, 3)])
        assert torch.equal(fused_new.weight, fused_old.weight[1::2][:, rows])
        assert torch.equal(small.transformer.wpe.weight, model.transformer.wpe.weight[:, 1::2])
    else:  # query, key and value of a head together
        rows = torch.cat([number * 12 + torch.arange(12) for number in (1, 3)])
        assert torch.equal(fused_new.weight, fused_old.weight[rows][:, 1::2])
        assert torch.equal(small.get_output_embeddings().weight, model.get_output_embeddings().weight[:, 1::2])
    assert torch.equal(fused_new.bias, fused_old.bias[rows])
    attended = [layers[place].get_submodule(layout.attended) for layers, place in ((old, 2), (new, 1))]
    assert torch.equal(attended[1].bias, attended[0].bias[1::2])


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_a_number_of_parameters_becomes_whole_heads(kind):
    big = {"vocab_size": 200, "n_embd": 96, "n_head": 6} if kind == "gpt2" else {"vocab_size": 200, "hidden_size": 96,
           "num_attention_heads": 6, "intermediate_size": 384}  # fmt: skip
    config = fused(kind, **big, **({"n_inner": None} if kind == "gpt2" else {})).config
    wanted = config_parameters(config) // 3
    target = target_config(config, wanted)
    assert target.hidden_size == 16 * target.num_attention_heads
    assert 0.6 * wanted < config_parameters(target) <= wanted
    choose(ones(new_causal_lm(config, seed=0)), config, target)
    with pytest.raises(ModelError, match="hidden_size = heads x 16"):
        choose(ones(new_causal_lm(config, seed=0)), config, target_config(config, "hidden_size=24,heads=3"))


def test_models_built_otherwise_are_refused():
    model = new_causal_lm(MptConfig(d_model=16, n_heads=4, n_layers=1, vocab_size=50), seed=0)
    with pytest.raises(ModelError, match="GPT-NeoX"):
        ones(model)


# -- what is learnt from --------------------------------------------------------------------------------------------


def test_a_teacher_equal_to_the_student_leaves_half_the_cross_entropy(model):
    student = Observed(model, options={"use_cache": False})
    twin = Observed(new_causal_lm(llama(), seed=0), frozen=True, options={"use_cache": False})
    twin.module.load_state_dict(model.state_dict())
    batch = batches(1)[0]
    both = TokenMatch(head_of(student), head_of(twin), ForwardKL(), divergence_weight=0.5, cross_entropy=0.5)
    (mixed,) = torch.autograd.grad(both(batch), model.lm_head.weight)
    (plain,) = torch.autograd.grad(loss_of(model)(batch), model.lm_head.weight)
    torch.testing.assert_close(mixed, 0.5 * plain, atol=1e-6, rtol=1e-4)


def test_a_teacher_sure_of_the_labels_teaches_them():
    """Soft cross-entropy to one-hot labels is the language-model loss; KL differs by an entropy of zero."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5), torch.randn(7, 5)
    labels = torch.randint(7, (6,))
    sure = 1e4 * torch.nn.functional.one_hot(labels, 7).float()
    found = linear_divergence(hidden, weight, sure, torch.eye(7), divergence=ForwardKL())
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(found.divergence, expected)


# -- a larger vocabulary --------------------------------------------------------------------------------------------

ENGLISH = "the river runs by the old mill and the river sings"
GERMAN = "ein Vogel sitzt auf der Brücke und singt"


def test_merging_tokenizers_keeps_old_text_and_shortens_new():
    old, other = train_bpe([ENGLISH] * 5, vocab_size=300), train_bpe([GERMAN] * 5, vocab_size=330)
    larger, parts = merged(old, other)
    assert larger(ENGLISH)["input_ids"] == old(ENGLISH)["input_ids"]
    found = larger(GERMAN)["input_ids"]
    assert larger.decode(found) == GERMAN and len(found) < len(old(GERMAN)["input_ids"]) / 2
    assert set(larger.get_vocab()) == set(old.get_vocab()) | set(other.get_vocab())
    assert all(larger.get_vocab()[token] == number for token, number in old.get_vocab().items())
    assert parts[: len(old)] == [[number] for number in range(len(old))] and len(parts) == len(larger)
    for number in range(len(old), len(larger)):  # the parts spell the token
        token = larger.convert_ids_to_tokens(number)
        assert "".join(old.convert_ids_to_tokens(parts[number])) == token
    assert (larger.eos_token_id, larger.pad_token_id) == (old.eos_token_id, old.pad_token_id)


def test_added_tokens_after_the_vocabulary_keep_their_ids():
    old = train_bpe([ENGLISH] * 5, vocab_size=300)
    old.add_tokens(["<tool>"])
    larger, _ = merged(old, train_bpe([GERMAN] * 5, vocab_size=330))
    assert larger.convert_tokens_to_ids("<tool>") == old.convert_tokens_to_ids("<tool>") == len(old) - 1
    assert larger("a<tool>")["input_ids"] == old("a<tool>")["input_ids"]


def test_whole_tokens_from_a_file(tmp_path):
    old = train_bpe([ENGLISH] * 5, vocab_size=300)
    file = tmp_path / "tokens.txt"
    file.write_text("Vogel\nthe\n\nVogel\nsitzt\n")
    larger, parts = extended_from(old, str(file))
    assert larger.convert_ids_to_tokens(range(len(old), len(larger))) == ["Vogel", "sitzt"]  # "the" is old
    assert old.decode(parts[-1]) == "sitzt" and len(old(GERMAN)["input_ids"]) - len(larger(GERMAN)["input_ids"]) == 8
    for text, said in (("\n", "no token in it is new"), ("Brücke", "would not be read back")):
        file.write_text(text)
        with pytest.raises(ModelError, match=said):
            extended_from(old, str(file))
    with pytest.raises(ModelError, match="no such file"):
        extended_from(old, str(tmp_path / "none.txt"))


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_begin_as_the_mean_of_their_parts_and_old_logits_stay(tied):
    old = train_bpe([ENGLISH] * 5, vocab_size=300)
    larger, parts = with_tokens(old, ["Vogel"])
    model = new_causal_lm(llama(vocab_size=len(old) + 3, tie_word_embeddings=tied), seed=0).eval()  # padded rows
    made = transplant(model, parts, larger)
    ids = old("Vogel", add_special_tokens=False)["input_ids"]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(model, get)().weight, getattr(made, get)().weight
        assert torch.equal(after[: len(old)], before[: len(old)]) and len(after) == len(larger)
        torch.testing.assert_close(after[-1], before[ids].mean(0))
    batch = {"input_ids": torch.tensor([old(ENGLISH)["input_ids"]])}
    with torch.no_grad():
        torch.testing.assert_close(made(**batch).logits[..., : len(old)], model(**batch).logits[..., : len(old)])
