"""The law of the capacity gap (card 112): the fit, the masks, cutting, and the size of MiniMA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Observed
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.linear_divergence import linear_divergence
from stillhouse.metrics.capacity_law import best_teacher, fit_law, recommend_teacher
from stillhouse.models.causal_lm import new_causal_lm, parameter_count
from stillhouse.models.lm_pruning import (
    MaskScores,
    choose,
    mask_scores,
    masked,
    ones,
    prune_causal_lm,
    target_config,
)
from stillhouse.models.scaling import config_parameters
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
