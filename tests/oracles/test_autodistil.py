"""AutoDistil (card 081): slices against whole models, relations against loops, sampling and search by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import Progress
from stillhouse.data.toy_languages import languages, vocabulary
from stillhouse.losses.relations import relation_heads, relation_kl, relation_mse, relations
from stillhouse.metrics.objectives import mean_values
from stillhouse.metrics.ranking import rank_correlation
from stillhouse.models.elastic import (
    SLIM,
    ElasticBert,
    SubNetwork,
    chosen_layers,
    extract,
    flops,
    load_encoder,
    load_encoder_classifier,
    parameter_count,
    whole,
)
from stillhouse.models.subspaces import SubSpace
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.objectives.relations import RelationMatch, Sandwich, last_relations, sub_network, view_relations
from stillhouse.systems.language.autodistil import SPACES
from stillhouse.tasks.encoder import demo_text
from stillhouse.tasks.encoder_transfer import classifier_on, pooled_states

CONFIG = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}
SUB = SubNetwork(3, 2, 20, 2.5)


def bert(seed: int = 0, **changes: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(**{**CONFIG, "intermediate_size": 72, "max_position_embeddings": 16, **changes})
    model = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids(T: int = 9) -> Tensor:
    return torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(1))


# -- relations ------------------------------------------------------------------------------------------------------


def test_relation_heads_by_the_card():
    """Width 64 * 8 = 512 in 12 heads: 42 each, 504 channels used."""
    x = torch.randn(1, 3, 512)
    heads = relation_heads(x, 12)
    assert heads.shape == (1, 12, 3, 42)
    assert torch.equal(heads[0, 11, 1], x[0, 1, 462:504])
    surplus = x.clone()
    surplus[..., 504:] += 1
    assert torch.equal(relations(surplus, 12), relations(x, 12))
    with pytest.raises(ValueError, match="relation heads"):
        relation_heads(torch.randn(1, 3, 4), 5)


@pytest.mark.parametrize("loss", [relation_mse, relation_kl])
def test_against_loops(loss):
    """Two widths, two heads, a padded sequence."""
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 9)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    total, count = 0.0, 0
    for b in range(2):
        real = [t for t in range(4) if mask[b, t]]
        for h in range(2):
            scores = []
            for x, d in ((student, 3), (teacher, 4)):
                part = x[b, :, h * d : h * d + d]
                scores.append({(i, j): float(part[i] @ part[j]) / d**0.5 for i in real for j in real})
            for i in real:
                if loss is relation_mse:
                    total += sum((scores[0][i, j] - scores[1][i, j]) ** 2 for j in real)
                    count += len(real)
                else:
                    rows = [torch.tensor([s[i, j] for j in real]).softmax(0) for s in scores]
                    total += float((rows[1] * (rows[1] / rows[0]).log()).sum())
                    count += 1
    assert loss(student, teacher, heads=2, mask_BT=mask).item() == pytest.approx(total / count, rel=1e-4)
    ones = torch.ones_like(mask)
    torch.testing.assert_close(loss(student, teacher, heads=2), loss(student, teacher, heads=2, mask_BT=ones))


@given(seed=st.integers(0, 1000), form=st.sampled_from([relation_mse, relation_kl]))
@settings(max_examples=20, deadline=None)
def test_rotations_within_heads_change_nothing(seed, form):
    """Any orthogonal map inside each relation head; one across heads does change it."""
    torch.manual_seed(seed)
    student, teacher = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)
    rotations = [torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0] for _ in range(2)]
    turned = student @ torch.block_diag(*rotations)
    expected = form(student, teacher, heads=2)
    torch.testing.assert_close(form(turned, teacher, heads=2), expected)
    across = student @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert abs(form(across, teacher, heads=2) - expected) > 1e-6
    assert form(student, student @ torch.block_diag(*rotations), heads=2).item() == pytest.approx(0, abs=1e-12)


# -- slices ---------------------------------------------------------------------------------------------------------


def test_layers_by_the_card():
    assert chosen_layers(6, 12) == [0, 2, 4, 6, 8, 10]  # d = 0.5
    assert chosen_layers(9, 12) == [0, 1, 2, 4, 5, 6, 8, 9, 10]  # d = 0.75
    for count in range(1, 13):
        assert chosen_layers(count, 12) == [int(i / (count / 12) + 1e-9) for i in range(count)]


def test_the_largest_slice_is_the_model():
    plain, elastic = bert(), ElasticBert(bert())
    expected = plain(ids()).last_hidden_state
    torch.testing.assert_close(elastic(ids())["hidden"], expected)
    with elastic.active(whole(plain.config)):
        torch.testing.assert_close(elastic(ids())["hidden"], expected)
    with elastic.active(SUB):
        assert elastic(ids())["hidden"].shape == (2, 9, 20)
        assert elastic(ids())["query"].shape == (2, 9, 16)  # the size of a head stays 8
    torch.testing.assert_close(elastic(ids())["hidden"], expected)  # nothing is left of it
    assert elastic.model.state_dict().keys() == plain.state_dict().keys()


def test_a_slice_against_a_forward_by_hand():
    """First heads, first units, layers 0, 1 and 2 of 4, with the formulas of BERT."""
    model = bert()
    elastic = ElasticBert(bert())
    state = model.state_dict()
    H, A, inner = SUB.hidden, 16, 50

    def linear(name: str, x: Tensor, rows: int) -> Tensor:
        return x @ state[f"{name}.weight"][:rows, : x.shape[-1]].T + state[f"{name}.bias"][:rows]

    def norm(name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"][:H] + state[f"{name}.bias"][:H]

    embedded = state["embeddings.word_embeddings.weight"][ids()] + state["embeddings.position_embeddings.weight"][:9]
    x = norm("embeddings.LayerNorm", (embedded + state["embeddings.token_type_embeddings.weight"][0])[..., :H])
    for index in (0, 1, 2):
        layer = f"encoder.layer.{index}"
        q, k, v = (
            linear(f"{layer}.attention.self.{name}", x, A).view(2, 9, 2, 8).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(f"{layer}.attention.output.LayerNorm", linear(f"{layer}.attention.output.dense", mixed, H) + x)
        wide = torch.nn.functional.gelu(linear(f"{layer}.intermediate.dense", x, inner))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", wide, H) + x)
    with elastic.active(SUB):
        found = elastic(ids())
    torch.testing.assert_close(found["hidden"], x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["query"], q.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sub", [SUB, SubNetwork(2, 2, 16, 3), SubNetwork(4, 3, 24, 3), SubNetwork(1, 1, 5, 1.5)])
def test_a_student_cut_out_gives_what_the_slice_gave(sub, tmp_path):
    elastic = ElasticBert(bert())
    with elastic.active(sub):
        expected = elastic(ids(), attention_mask=torch.tensor([[1] * 9, [1] * 6 + [0] * 3]))
    student = extract(elastic, sub)
    student.save_pretrained(tmp_path)
    plain = sub.heads * 8 == sub.hidden
    assert student.config.model_type == ("bert" if plain else SLIM + "bert")
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    for loaded in (student, load_encoder(tmp_path), AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)):
        found = loaded.eval()(ids(), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found[mask.bool()], expected["hidden"][mask.bool()], rtol=1e-4, atol=1e-5)
    tuned = load_encoder(tmp_path, masked_lm=True)
    tuned.save_pretrained(tmp_path / "tuned")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "tuned").eval()
    assert torch.equal(again(ids()).logits, tuned(ids()).logits) and again(ids()).logits.shape == (2, 9, 50)
    if plain:
        assert type(again).__module__.startswith("transformers.")


@pytest.mark.parametrize("sub", [SUB, SubNetwork(2, 2, 16, 3), SubNetwork(4, 3, 24, 3)])
def test_parameters_are_counted(sub):
    config = bert().config
    student = extract(ElasticBert(bert()), sub)
    assert parameter_count(sub, config) == sum(p.numel() for p in student.parameters())


def test_parameters_by_the_formula_of_the_release():
    """The formula the code sorts by has the width of attention follow H, so it is exact at H = 768 and A = 12 alone.

    There it counts the pooler as well, H^2 + H, and H more. The student found, "26M" by it, has 29.8M parameters.
    """

    def by_release(L: int, A: int, H: int, R: int) -> int:
        return (
            H * (30522 + 512 + 2 + 2)
            + (H**2 + 3 * H**2 * A // 12 + 4 * H + 2 * H) * L
            + (2 * H**2 * R + H * R + H + 2 * H) * L
            + H**2
            + 2 * H
        )

    config = BertConfig(vocab_size=30522)
    assert by_release(12, 12, 768, 4) == parameter_count(SubNetwork(12, 12, 768, 4), config) + 768**2 + 2 * 768
    assert round(by_release(11, 8, 352, 4) / 1e6, 1) == 26.1
    assert round(parameter_count(SubNetwork(11, 8, 352, 4), config) / 1e6, 1) == 29.8


def test_flops_of_one_layer_by_hand():
    """2 FLOPs a multiplication: Q, K, V, O, scores, mixing, and the two maps of the feed-forward part."""
    sub = SubNetwork(1, 2, 20, 2.5)
    T, H, A, inner = 7, 20, 16, 50
    by_hand = 2 * (3 * T * H * A + T * A * H + T * T * A + T * T * A + T * H * inner + T * inner * H)
    assert flops(sub, bert().config, length=T) == by_hand


def test_what_is_no_sub_network():
    elastic = ElasticBert(bert())
    for sub in (SubNetwork(5, 1, 8, 1), SubNetwork(1, 4, 8, 1), SubNetwork(1, 1, 25, 1), SubNetwork(1, 1, 24, 4)):
        with pytest.raises(ModelError, match="the super-network has"), elastic.active(sub):
            pass
    with pytest.raises(ModelError, match="a llama encoder cannot be made a super-network; give a BERT"):
        ElasticBert(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
                )
            )
        )
    with pytest.raises(ConfigError, match="layers/heads/hidden/ratio"):
        SubNetwork.parse("4/3/24")


# -- sub-spaces, sampling, search -----------------------------------------------------------------------------------


def test_the_paper_s_sub_spaces():
    spaces = [SubSpace.parse(text) for text in SPACES]
    assert [len(set(space.all())) for space in spaces] == [256, 256, 256]
    base, small, tiny = spaces
    assert base.hidden == (544, 576, 608, 640) and base.ratio == (2.5, 3.0, 3.5, 4.0)
    assert small.heads == (7, 8, 9, 10) and small.hidden == (256, 288, 320, 352)
    assert tiny.layers == (4, 5, 6, 7) and tiny.smallest == SubNetwork(4, 7, 128, 2.0)
    assert SubNetwork(11, 8, 352, 4) in small.all()  # the student the paper found
    assert tiny.spans(SubNetwork(5, 8, 150, 2.2)) and not tiny.spans(SubNetwork(9, 8, 150, 2.2))


@pytest.mark.parametrize(
    "text",
    ["layers=1 heads=1 hidden=8 ratio=1", "a: layers=1 heads=1 hidden=8", "a: layers=3-1 heads=1 hidden=8 ratio=1",
     "a: layers=x heads=1 hidden=8 ratio=1", "a: layers=1-2-3 heads=1 hidden=8 ratio=1"],
)  # fmt: skip
def test_sub_spaces_that_are_none(text):
    with pytest.raises(ConfigError, match="sub-space"):
        SubSpace.parse(text)


SPACE = SubSpace.parse("all: layers=2-4 heads=1-3 hidden=8-24 ratio=1-3", choices=3)


def sandwich(elastic: ElasticBert, teacher: Observed, **options: object) -> Sandwich:
    student = Observed(elastic)
    return Sandwich(
        student,
        SPACE,
        lambda view: RelationMatch(view_relations(view), last_relations(teacher), heads=2),
        **options,  # type: ignore[arg-type]
    )


def test_every_step_has_both_extremes():
    objective = sandwich(ElasticBert(bert()), Observed(bert(1), frozen=True), random=2)
    drawn = [objective.draw(step) for step in range(200)]
    assert all(subs[:2] == [SPACE.largest, SPACE.smallest] and len(subs) == 4 for subs in drawn)
    others = {sub for subs in drawn for sub in subs[2:]}
    assert len(others) > 60 and others <= set(SPACE.all())  # of 81
    assert [objective.draw(step) for step in range(5)] == drawn[:5]
    without = sandwich(ElasticBert(bert()), Observed(bert(1), frozen=True), random=4, extremes=False)
    assert sum(SPACE.largest in without.draw(step) for step in range(50)) < 20


def test_a_sandwich_is_the_sum_over_its_sub_networks():
    """Gradients too, so one step accumulates those of all four; what no sub-network reaches gets none."""
    teacher = Observed(bert(1), frozen=True)
    elastic, alone = ElasticBert(bert()), ElasticBert(bert())
    objective = sandwich(elastic, teacher, random=2, seed=3)
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    loss = objective(batch, Progress(7, 10))
    loss.backward()
    student, total = Observed(alone), torch.zeros(())
    for sub in objective.draw(7):
        term = RelationMatch(view_relations(sub_network(student, sub)), last_relations(teacher), heads=2)
        total = total + term(batch)
    total.backward()
    torch.testing.assert_close(loss, total)
    for (name, one), other in zip(elastic.named_parameters(), alone.parameters(), strict=True):
        if one.grad is not None or other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)
    query = elastic.model.encoder.layer[3].attention.self.query.weight.grad  # the largest alone has layer 3
    assert query is not None and query.abs().max() > 0
    assert elastic.model.encoder.layer[3].output.dense.weight.grad is None  # after the last relations


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    teacher, student = Observed(bert(), frozen=True), Observed(bert())
    for form in ("mse", "kl"):
        term = RelationMatch(last_relations(student), last_relations(teacher), heads=3, form=form)  # type: ignore[arg-type]
        assert term({"input_ids": ids()}).item() == pytest.approx(0, abs=1e-7)
    elastic = Observed(ElasticBert(bert()))
    losses = mean_values(
        {
            str(sub): RelationMatch(view_relations(sub_network(elastic, sub)), last_relations(teacher), heads=3)
            for sub in (SPACE.smallest, whole(bert().config))
        },
        [{"input_ids": ids()}],
    )
    assert losses["4/3/24/3"] == pytest.approx(0, abs=1e-7)
    assert losses[str(SPACE.smallest)] > 0.01


def test_the_term_is_three_relations_of_the_last_layer():
    teacher, student = bert(1), bert()
    term = RelationMatch(last_relations(Observed(student)), last_relations(Observed(teacher, frozen=True)), heads=4)
    expected = torch.zeros(())
    layers = [model(ids(), output_hidden_states=True).hidden_states[-2] for model in (student, teacher)]
    for name in ("query", "key", "value"):
        s, t = (
            getattr(model.encoder.layer[-1].attention.self, name)(x)
            for model, x in zip((student, teacher), layers, strict=True)
        )
        s, t = (y.unflatten(-1, (4, 6)).transpose(1, 2) for y in (s, t))
        expected = expected + ((s @ s.mT - t @ t.mT) / 6**0.5).square().mean()
    torch.testing.assert_close(term({"input_ids": ids()}), expected)


# -- labelled text, probes, ranking ---------------------------------------------------------------------------------


def cut_out(sub: SubNetwork = SUB) -> BertModel:
    return extract(ElasticBert(bert()), sub)


@pytest.mark.parametrize("sub", [SUB, SubNetwork(2, 2, 16, 3)])
def test_a_student_found_becomes_a_classifier_and_comes_back(sub, tmp_path):
    """Slim or plain: it begins with the student's own weights, and its ecosystem loads it."""
    student = cut_out(sub)
    model = classifier_on(student, ("a", "b", "c"), seed=3).eval()
    hidden = student(ids()).last_hidden_state
    torch.testing.assert_close(model.bert(ids()).last_hidden_state, hidden)
    pooled = torch.tanh(hidden[:, 0] @ model.bert.pooler.dense.weight.T + model.bert.pooler.dense.bias)
    logits = pooled @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(ids()).logits, logits)
    model.save_pretrained(tmp_path)
    again = load_encoder_classifier(tmp_path)
    assert torch.equal(again(ids()).logits, model(ids()).logits) and again.config.id2label == {0: "a", 1: "b", 2: "c"}


class Held:
    """Labelled text that is one padded batch."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def batches_of(self, _data: object) -> list[dict[str, Tensor]]:
        return [{"input_ids": ids(), "attention_mask": self.mask, "labels": torch.zeros(2)}]


def test_probed_states_are_means_over_the_tokens_that_are_there():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    model = bert()
    found = pooled_states(Held(mask), model, None)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], model(ids()[:1]).last_hidden_state[0].mean(0))
    torch.testing.assert_close(found[1], model(ids()[1:, :5]).last_hidden_state[0].mean(0))
    elastic = ElasticBert(bert())
    with elastic.active(SUB):  # a slice is probed as the student cut out of it would be
        sliced = pooled_states(Held(mask), elastic, None)  # type: ignore[arg-type]
    torch.testing.assert_close(sliced, pooled_states(Held(mask), cut_out(), None))  # type: ignore[arg-type]


def test_rank_correlations_by_hand():
    """Of 1 2 3 4 and 1 3 2 4: rho = 1 - 6 * 2 / 60; tau = (5 - 1) / 6. Only order counts."""
    found = rank_correlation([1, 2, 3, 4], [10, 900, 20, 1e6])
    assert found == pytest.approx({"spearman": 0.8, "kendall": 2 / 3})
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx({"spearman": -1, "kendall": -1})
    assert all(math.isnan(value) for value in rank_correlation([1, 1, 1], [1, 2, 3]).values())


def test_the_embedded_text_ends_its_sentences_and_has_no_unknown_word():
    tokenizer = word_tokenizer(vocabulary(languages(1)))
    numbers = tokenizer(list(demo_text(50).documents["text"]), add_special_tokens=False).input_ids
    assert len(numbers) == 2 and tokenizer.unk_token_id not in {*numbers[0], *numbers[1]}
    assert numbers[0].count(tokenizer.sep_token_id) == 24
