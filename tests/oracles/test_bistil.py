"""BiStil (card 065): trimming, inherited layers, sparse differences, the inner losses, zero-shot parts."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.core.observed import Observed, Turn
from stillhouse.core.player import adamw
from stillhouse.data.alternating import Alternating
from stillhouse.data.sources import Drawn
from stillhouse.losses.attention_scores import attention_probabilities, masked_mse
from stillhouse.models.sparse_masks import (
    SparseDifference,
    applied,
    encoder_parameters,
    largest_changes,
    train_only,
)
from stillhouse.models.tokenizers import train_bpe
from stillhouse.models.vocab_trimming import cut_down, inherited_layers, trim_tokenizer, used_tokens
from stillhouse.models.width_reduction import narrowed, projected, sampled_states, top_directions
from stillhouse.objectives.encoders import SoftTargets
from stillhouse.tasks.bilingual import inner_match

TEXT = ["the river runs by the old mill and the river sings", "a bird sees the mill, a bird sees the stone"]
OTHER = ["zwei alte Männer gehen über die Brücke", "ein Vogel sitzt auf der Brücke und singt"]
SMALL = {"vocab_size": 60, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 80}


def classifier(layers: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SMALL, num_hidden_layers=layers, num_labels=3)).eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}


def fast(model: object, trainer: object, before: object, template: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    backend.train_from_iterator(TEXT * 5 + OTHER * 5, trainer=trainer)
    if template:
        ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.RobertaProcessing(ends[1], ends[0], add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    )


def unigram() -> PreTrainedTokenizerFast:
    """As XLM-R has it."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    return fast(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def wordpiece() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    trainer = trainers.WordPieceTrainer(vocab_size=130, special_tokens=special, show_progress=False)
    return fast(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace())


def bpe() -> PreTrainedTokenizerFast:
    tokenizer = train_bpe(TEXT * 3 + OTHER * 3, vocab_size=330, special_tokens=("<s>", "<mask>"))
    tokenizer.mask_token = "<mask>"
    return tokenizer


# -- vocabulary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [unigram, wordpiece, bpe])
def test_texts_become_the_same_tokens_after_trimming(make):
    tokenizer = make()
    trimmed, old = trim_tokenizer(tokenizer, used_tokens(tokenizer, [TEXT]))
    assert len(trimmed) == len(old) < len(tokenizer)
    assert old.tolist() == sorted(set(old.tolist()))
    for text in TEXT:
        own = trimmed(text)["input_ids"]
        assert old[own].tolist() == tokenizer(text)["input_ids"]
    for name in ("pad_token", "mask_token", "eos_token"):
        token = getattr(tokenizer, name)
        assert getattr(trimmed, name) == token
        assert int(old[trimmed.convert_tokens_to_ids(token)]) == tokenizer.convert_tokens_to_ids(token)


def test_a_trimmed_tokenizer_is_loaded_again(tmp_path):
    from transformers import AutoTokenizer

    trimmed, _ = trim_tokenizer(unigram(), used_tokens(unigram(), [TEXT, OTHER]))
    trimmed.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT[0])["input_ids"] == trimmed(TEXT[0])["input_ids"]


def test_the_threshold_is_a_probability_in_one_text():
    tokenizer = wordpiece()
    special = set(tokenizer.all_special_ids)
    common = used_tokens(tokenizer, [["the"] * 9 + ["mill"], ["mill"]], threshold=0.5)
    assert tokenizer.convert_ids_to_tokens(sorted(common - special)) != []
    alone = used_tokens(tokenizer, [["the"] * 9 + ["mill"]], threshold=0.5)
    (the,) = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert alone == special | {the} and alone < common


@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
def test_logits_of_kept_tokens_stay_what_they_were(kind):
    tokenizer = unigram()
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "pad_token_id": tokenizer.pad_token_id}
    model = (
        BertForMaskedLM(BertConfig(**config)) if kind == "bert" else XLMRobertaForMaskedLM(XLMRobertaConfig(**config))
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.copy_(torch.randn(len(tokenizer)))
    trimmed, old = trim_tokenizer(tokenizer, used_tokens(tokenizer, [TEXT]))
    small = cut_down(model, old, layers=[0, 1], tokenizer=trimmed)
    with torch.no_grad():
        whole = model(**tokenizer(TEXT[0], return_tensors="pt")).logits
        cut = small(**trimmed(TEXT[0], return_tensors="pt")).logits
    torch.testing.assert_close(cut, whole[..., old])
    assert small.config.vocab_size == cut.shape[-1] == len(old)


# -- layers ---------------------------------------------------------------------------------------------------------


def test_inherited_layers():
    assert inherited_layers(12, 2) == [1, 3, 5, 7, 9, 11]
    assert inherited_layers(12, 3) == [2, 5, 8, 11]
    assert inherited_layers(12, 3, which="bottom") == [0, 1, 2, 3]
    with pytest.raises(ModelError, match="divisor"):
        inherited_layers(12, 5)


def test_layers_are_copied_from_where_the_map_says():
    model = classifier(4)
    small = cut_down(model, torch.arange(60), layers=inherited_layers(4, 2), tokenizer=unigram())
    for own, theirs in ((0, 1), (1, 3)):
        found = small.bert.encoder.layer[own].state_dict()
        assert all(
            torch.equal(value, found[key]) for key, value in model.bert.encoder.layer[theirs].state_dict().items()
        )


def test_the_inner_loss_is_nothing_without_reduction_and_something_with():
    model, data = classifier(4), batch()
    for factor, nothing in ((1, True), (2, False)):
        small = cut_down(model, torch.arange(60), layers=inherited_layers(4, factor), tokenizer=unigram())
        value = float(inner_match(Observed(small), Observed(classifier(4), frozen=True))(data))
        assert (value == 0.0) == nothing


def test_attention_is_compared_as_probabilities_of_real_tokens():
    """Against maps of the model itself, mean over layers; the hidden states' mean is over embeddings and layers."""
    student, teacher, data = classifier(1, 1), classifier(2, 2), batch()
    outputs = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(
                model(
                    input_ids=data["input_ids"],
                    attention_mask=data["attention_mask"],
                    output_attentions=True,
                    output_hidden_states=True,
                )
            )
    maps = [outputs[0].attentions[0], outputs[1].attentions[1]]
    states = [(outputs[0].hidden_states[i], outputs[1].hidden_states[2 * i]) for i in range(2)]
    expected = 0.0
    for b, real in enumerate((5, 3)):
        square = (maps[0][b, :, :real, :real] - maps[1][b, :, :real, :real]).square().sum()
        expected += float(square) / (3 * (25 + 9))
        for own, theirs in states:
            expected += float((own[b, :real] - theirs[b, :real]).square().sum()) / (8 * 12) / 2
    value = inner_match(Observed(student), Observed(teacher, frozen=True))(data)
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_padding_is_exactly_0_in_probabilities_and_left_out():
    scores, mask = torch.randn(1, 2, 4, 4), torch.tensor([[1, 1, 1, 0]])
    probabilities = attention_probabilities(scores, mask)
    assert (probabilities[..., 3] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 2, 4))
    assert float(masked_mse(torch.zeros(1, 4, 2), torch.ones(1, 4, 2), mask[..., None])) == 1.0


def test_soft_labels_without_the_square():
    logits = torch.randn(4, 3)
    signal = Observed(classifier()).output("logits")
    term = SoftTargets(signal, signal, temperature=2.0, rescale=False)
    p = (logits / 2).softmax(-1)
    found = term.compute(student=logits, teacher=logits)
    assert float(found) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)


# -- sparse differences ---------------------------------------------------------------------------------------------


def tuned(density: float, steps: int = 3) -> tuple[BertForSequenceClassification, dict[str, Tensor], dict[str, Tensor]]:
    """A model trained at the masked places, what it was before, and the masks; AdamW, gradients clipped."""
    model = classifier()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    moved = {name: value.detach() for name, value in classifier(seed=5).named_parameters()}
    names = encoder_parameters(model)
    masks = largest_changes(before, moved, names, density=density)
    train_only(model, masks, frozen=lambda name: name in names)
    optimizer = adamw(1e-2, weight_decay=0.0)([{"params": [p for p in model.parameters() if p.requires_grad]}])
    for _ in range(steps):
        model(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, before, masks


def test_so_many_places_with_one_threshold():
    before, after = ({name: p.detach() for name, p in classifier(seed=s).named_parameters()} for s in (0, 5))
    names = encoder_parameters(classifier())
    masks = largest_changes(before, after, names, density=0.08)
    total = sum(before[name].numel() for name in names)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.08 * total)
    moved = {name: (after[name] - before[name]).abs() for name in names}
    least = min(float(moved[name][mask].min()) for name, mask in masks.items() if mask.any())
    most = max(float(moved[name][~mask].max()) for name, mask in masks.items() if not mask.all())
    assert least >= most
    assert not any("pooler" in name or "classifier" in name for name in names)
    assert all("LayerNorm" not in name for name in encoder_parameters(classifier(), freeze_norms=True))
    with pytest.raises(ConfigError, match="density"):
        largest_changes(before, after, names, density=0.0)


def test_other_places_stay_bit_for_bit_and_the_head_is_dense():
    model, before, masks = tuned(0.08)
    changed = 0
    for name, value in model.named_parameters():
        if name in masks:
            assert torch.equal(value[~masks[name]], before[name][~masks[name]])
            changed += int((value != before[name]).sum())
        else:
            assert not torch.equal(value, before[name])
    assert changed > 0.1 * sum(int(mask.sum()) for mask in masks.values())


def test_density_1_is_full_fine_tuning():
    model, _, _ = tuned(1.0)
    plain = classifier()
    optimizer = adamw(1e-2, weight_decay=0.0)([{"params": list(plain.parameters())}])
    for _ in range(3):
        plain(**batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_put_on_and_taken_off_the_model_is_what_it_was(tmp_path):
    model, before, masks = tuned(0.08)
    after = dict(model.named_parameters())
    SparseDifference.between(before, after, masks).save(tmp_path)
    difference = SparseDifference.load(tmp_path)
    assert len(difference) == sum(int(mask.sum()) for mask in masks.values())
    plain = classifier()
    with applied(plain, difference, difference):
        inside = {name: value.detach().clone() for name, value in plain.named_parameters()}
    for name, value in plain.named_parameters():
        assert torch.equal(value, before[name])
        if name in masks:
            torch.testing.assert_close(inside[name], before[name] + 2 * (after[name] - before[name]))
    difference.add_to(plain)
    for name, mask in masks.items():
        torch.testing.assert_close(dict(plain.named_parameters())[name][mask], after[name][mask])
    with pytest.raises(ModelError, match="lacks"), applied(torch.nn.Linear(2, 2), difference):
        pass
    with pytest.raises(ModelError, match="no sparse-difference"):
        SparseDifference.load(tmp_path / "nothing")


def test_the_teacher_is_adapted_to_the_language_of_the_batch():
    """And reads the student's tokens under its own ids."""
    from stillhouse.tasks.bilingual import BilingualTask

    model = classifier()
    place = torch.tensor([0])
    name = "bert.encoder.layer.0.output.dense.bias"
    both = [SparseDifference({name: (place, torch.tensor([value]))}) for value in (3.0, -3.0)]
    old = torch.arange(59, -1, -1)
    teacher = BilingualTask.reading(None, model, old, both)  # type: ignore[arg-type]
    signal = teacher.tap("bert.encoder.layer.0.output.dense")
    data = {**batch(), "input_ids": 59 - batch()["input_ids"]}
    first, second = (Turn([signal]).read(signal, {**data, "language": torch.full((2,), n)}) for n in (0, 1))
    plain = Observed(classifier(), frozen=True).tap("bert.encoder.layer.0.output.dense")
    expected = plain(batch())
    torch.testing.assert_close(first[..., 0], expected[..., 0] + 3)
    torch.testing.assert_close(second[..., 0], expected[..., 0] - 3)
    torch.testing.assert_close(first[..., 1:], expected[..., 1:])


def test_languages_take_turns_and_are_resumed():
    def make() -> Alternating:
        draws = [Drawn(lambda g: {"input_ids": torch.randint(9, (2, 3), generator=g)}, seed=s) for s in (0, 1)]
        return Alternating(draws)

    whole = make()
    seen = [next(whole) for _ in range(7)]
    assert [int(one["language"][0]) for one in seen] == [0, 1, 0, 1, 0, 1, 0]
    begun, resumed = make(), make()
    for _ in range(3):
        next(begun)
    resumed.load_state_dict(begun.state_dict())
    for expected in seen[3:]:
        found = next(resumed)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# -- width ----------------------------------------------------------------------------------------------------------


def test_the_top_directions_leave_the_tail_singular_values():
    states = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = states * torch.linspace(3, 0.1, 12, dtype=torch.float64) + 1.0  # not centred
    values = torch.linalg.svdvals(states)
    for width in (1, 5, 12):
        found = top_directions(states, width)
        torch.testing.assert_close(found.T @ found, torch.eye(width, dtype=torch.float64))
        left = states - states @ found @ found.T
        torch.testing.assert_close(left.square().sum(), values[width:].square().sum(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close((states @ found).norm(dim=0), values[:width])  # by falling singular value
        torch.testing.assert_close(projected(states, width).norm(), values[:width].norm())
    with pytest.raises(ModelError, match="give more text"):
        top_directions(states[:4], 5)


def test_the_full_width_is_a_rotation():
    states = torch.randn(30, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = states @ top_directions(states, 12)
    torch.testing.assert_close(turned @ turned.T, states @ states.T)  # lengths and angles stay


def hidden_states(model: BertForSequenceClassification, data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


def test_a_projected_teacher_is_matched_where_its_states_are_seen():
    """Against the definition; full width and copied weights with the identity as directions give no loss."""
    teacher, data = classifier(4), batch()
    copied = cut_down(teacher, torch.arange(60), layers=range(4), tokenizer=unigram())
    same = inner_match(Observed(copied), Observed(teacher, frozen=True), [torch.eye(12)] * 5)
    assert float(same(data)) == 0.0
    states = hidden_states(teacher, data)
    directions = [top_directions(layer.flatten(0, 1), 6) for layer in states]
    small = narrowed(cut_down(teacher, torch.arange(60), layers=[1, 3], tokenizer=unigram()), 2, seed=0)
    match = inner_match(Observed(small), Observed(teacher, frozen=True), directions)
    blind = inner_match(Observed(small), Observed(teacher, frozen=True), [torch.zeros(12, 6)] * 5)
    expected = 0.0  # what hidden states differ by, beyond attention, which both have
    for place, own in enumerate(hidden_states(small, data)):
        seen = states[2 * place] @ directions[2 * place]
        square = ((own - seen).square() - own.square()).sum(-1) * data["attention_mask"]
        expected += float(square.sum()) / (8 * 6) / 3
    assert float((match(data) - blind(data)).detach()) == pytest.approx(expected, rel=1e-4)
    assert not list(match.parameters())  # the directions do not learn


def test_a_narrower_student_keeps_the_heads_and_sees_the_embeddings_projected():
    model = classifier(2)
    small = narrowed(model, 2, seed=0)
    config = small.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (6, 10, 3)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(small.get_input_embeddings().weight, table @ top_directions(table, 6))
    again = narrowed(model, 2, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(small.parameters(), again.parameters(), strict=True))
    with pytest.raises(ModelError, match="hidden_factor=3"):
        narrowed(model, 3, seed=0)


def test_padding_is_never_sampled():
    data = batch()
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    model = classifier(2)
    drawn = sampled_states(model, inputs, count=50, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == 3 and drawn[0].shape == (100, 12)
    for layer, states in enumerate(hidden_states(model, data)):
        real = torch.cat([states[0], states[1, :3]])
        which = (drawn[layer][:, None] - real).abs().amax(-1).min(1)
        assert float(which.values.max()) < 1e-5 and len(set(which.indices.tolist())) == 8


def test_a_student_has_no_dropout():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "hidden_dropout_prob": 0.1}, num_hidden_layers=2))
    small = cut_down(model, torch.arange(60), layers=[1], tokenizer=unigram())
    assert small.config.hidden_dropout_prob == 0.0 and model.config.hidden_dropout_prob == 0.1
