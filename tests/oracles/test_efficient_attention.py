"""Efficient-attention KD (card 168): conversions against full attention, the loss, entities, costs, documents."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from stillhouse.base.errors import DataError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.metrics.answers import answer_f1, answer_scores, answer_words
from stillhouse.models.efficient_attention import (
    PeakTensors,
    alternate_layers,
    convert_encoder,
    encoder_cost,
    load_efficient,
    reserved_positions,
    shallow,
    tile_positions,
    token_classifier,
)
from stillhouse.models.tokenizers import train_bpe
from stillhouse.objectives.distilbert import triple_loss
from stillhouse.systems.language.efficient_attention_kd import EfficientAttentionKD
from stillhouse.tasks.long_context import (
    Document,
    Lexicon,
    encode_tagged,
    entities,
    entity_f1,
    first_answer,
    make_document,
    mix_lengths,
    pareto,
    read_questions,
    read_tagged,
    retention,
)

EFFICIENT: dict[str, dict[str, Any]] = {
    "longformer": {"attention": "longformer", "window": 8},
    "bigbird": {"attention": "bigbird", "block": 4, "random_blocks": 1},
    "nystromformer": {"attention": "nystromformer", "landmarks": 8},
    "lsg": {"attention": "lsg", "block": 4, "global_ids": [3, 4]},
}
every_kind = pytest.mark.parametrize("kind", EFFICIENT)


def encoder(source: str = "bert", *, layers: int = 2, positions: int = 32) -> Any:
    torch.manual_seed(0)
    config, model = {"bert": (BertConfig, BertForMaskedLM), "roberta": (RobertaConfig, RobertaForMaskedLM)}[source]
    made = model(
        config(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.3,
            pad_token_id=1,
            bos_token_id=None,
            eos_token_id=None,
            max_position_embeddings=positions + (2 if source == "roberta" else 0),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return made.eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 40, (2, 32), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 27:], ids[0, 27:] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the tokens that are there."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


# -- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (32, {"attention": "full"}),
        (64, {"attention": "longformer", "window": 64}),  # a window as wide as the text
        (32, {"attention": "nystromformer", "landmarks": 32}),  # every token a landmark
        (32, {"attention": "lsg", "block": 16, "selection": "none"}),  # two blocks, each other's neighbours
        (32, {"attention": "lsg", "block": 11, "factor": 1, "selection": "norm"}),  # three, and all tokens beyond
        (32, {"attention": "lsg", "block": 11, "factor": 1, "selection": "pooling"}),
        (32, {"attention": "lsg", "block": 11, "factor": 1, "selection": "strided"}),
        (32, {"attention": "lsg", "block": 11, "factor": 1, "selection": "block-strided"}),
    ],
)
def test_attention_that_sees_everything_is_full_attention(source, length, options, batch):
    before = encoder(source)
    torch.testing.assert_close(
        logits(convert_encoder(before, length=length, **options), batch), logits(before, batch), rtol=1e-4, atol=1e-4
    )


def test_bigbird_with_all_blocks_is_full_attention(batch):
    before = encoder()
    model = convert_encoder(before, length=32, **EFFICIENT["bigbird"])
    assert not torch.allclose(logits(model, batch), logits(before, batch), atol=1e-2)
    model.bert.set_attention_type("original_full")
    torch.testing.assert_close(logits(model, batch), logits(before, batch), rtol=1e-4, atol=1e-4)


@every_kind
def test_less_than_everything_is_something_else(kind, batch):
    before = encoder()
    model = convert_encoder(before, length=32, **EFFICIENT[kind])
    assert not torch.allclose(logits(model, batch), logits(before, batch), atol=1e-2)


@torch.no_grad()
def test_a_window_reaches_half_of_it_on_either_side_and_a_global_token_everything():
    model = convert_encoder(encoder(layers=1), "longformer", length=32, window=8)
    ids = torch.randint(2, 40, (1, 32), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 16] = (ids[0, 16] + 5) % 38 + 2
    moved = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == list(range(12, 21))
    first = (torch.arange(32) == 0).long()[None]
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 5) % 38 + 2
    apart = (
        model(input_ids=ids, global_attention_mask=first).logits
        - model(input_ids=changed, global_attention_mask=first).logits
    )
    assert (apart.abs().amax(-1)[0] > 0).all()


def test_global_projections_begin_as_the_local_ones_and_the_convolution_at_zero():
    before = encoder()
    long = convert_encoder(before, length=32, **EFFICIENT["longformer"]).longformer.encoder.layer[1].attention.self
    theirs = before.bert.encoder.layer[1].attention.self
    for part in ("query", "key", "value"):
        for name in (part, f"{part}_global"):
            assert torch.equal(getattr(long, name).weight, getattr(theirs, part).weight)
        assert getattr(long, f"{part}_global").weight.data_ptr() != getattr(long, part).weight.data_ptr()
    nystrom = convert_encoder(before, length=32, **EFFICIENT["nystromformer"])
    assert nystrom.nystromformer.encoder.layer[0].attention.self.conv.weight.abs().max() == 0


def test_tiled_positions():
    table = torch.arange(12.0).view(6, 2)
    tiled = tile_positions(table, 15)
    assert tiled.shape == (15, 2) and all(torch.equal(tiled[6 + i], tiled[i]) for i in range(9))
    assert torch.equal(tile_positions(table, 9, trained=4)[4:8], table[:4])


@pytest.mark.parametrize("source", ["bert", "roberta"])
@every_kind
def test_position_i_of_the_long_table_is_position_i_of_the_short_one(source, kind):
    before = encoder(source)
    options = {**EFFICIENT[kind], **({"landmarks": 16} if kind == "nystromformer" else {})}
    model = convert_encoder(before, length=80, trained=20, **options)
    own = getattr(model, model.base_model_prefix).embeddings.position_embeddings.weight[reserved_positions(model) :]
    theirs = getattr(before, source).embeddings.position_embeddings.weight[reserved_positions(before) :]
    assert len(own) == 80
    for place in (0, 19, 20, 41, 79):
        assert torch.equal(own[place], theirs[place % 20])


@pytest.mark.parametrize("kind", ["longformer", "bigbird", "lsg"])
def test_what_stands_in_the_padding_does_not_matter(kind, batch):
    """Nystromformer is left out: its landmarks are means over segments, padding included."""
    model = convert_encoder(encoder(), length=32, **EFFICIENT[kind])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 27:] = 7
    torch.testing.assert_close(logits(model, batch), logits(model, other))


def test_what_cannot_be_converted():
    before = encoder()
    with pytest.raises(ModelError, match="multiple of 8"):
        convert_encoder(before, "longformer", length=36, window=8)
    with pytest.raises(ModelError, match="more than 28 tokens"):
        convert_encoder(before, "bigbird", length=28, block=4, random_blocks=1)
    with pytest.raises(ModelError, match="32 positions"):
        convert_encoder(before, "full", length=64, trained=33)
    with pytest.raises(ModelError, match="gpt2 model cannot be converted"):
        convert_encoder(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), "full", length=8)
    with pytest.raises(ModelError, match="a multiple of the factor"):
        convert_encoder(before, "lsg", length=32, block=9, factor=2)


# -- students -------------------------------------------------------------------------------------------------------


def test_alternate_layers():
    assert alternate_layers(12, 6) == [0, 2, 4, 6, 8, 10]
    assert alternate_layers(6, 3) == [0, 2, 4] and alternate_layers(5, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ModelError, match="a student of 3 layers"):
        alternate_layers(2, 3)


@every_kind
def test_a_student_has_the_layers_it_was_given(kind, batch, tmp_path):
    whole = convert_encoder(encoder(layers=4), length=32, **EFFICIENT[kind])
    student = shallow(whole, [0, 2])
    layers, own = (getattr(one, one.base_model_prefix).encoder.layer for one in (whole, student))
    assert len(own) == 2
    for new, old in ((0, 0), (1, 2)):
        for name, tensor in own[new].state_dict().items():
            assert torch.equal(tensor, layers[old].state_dict()[name])
    torch.testing.assert_close(logits(shallow(whole, [0, 1, 2, 3]), batch), logits(whole, batch))
    fresh = [shallow(whole, [0, 2], seed=seed) for seed in (0, 0, 1)]
    word = [getattr(one, one.base_model_prefix).embeddings.word_embeddings.weight for one in (*fresh, whole)]
    assert (
        torch.equal(word[0], word[1]) and not torch.allclose(word[0], word[2]) and not torch.allclose(word[0], word[3])
    )
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_efficient(tmp_path), batch), logits(student, batch))
    tagger = token_classifier(student, ["O", "B-PER"], seed=0)
    base = getattr(tagger, tagger.base_model_prefix)
    assert logits(tagger, batch).shape[-1] == 2 and tagger.config.id2label == {0: "O", 1: "B-PER"}
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, getattr(student, student.base_model_prefix).state_dict()[name])


# -- the loss -------------------------------------------------------------------------------------------------------


def objective(student: Any, teacher: Any, **changes: float) -> Any:
    weights = {"soft": 5.0, "masked": 2.0, "cosine": 1.0, "temperature": 2.0, **changes}
    return triple_loss(Observed(student), Observed(teacher, frozen=True), **weights)


def masked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 3:9:2] = batch["input_ids"][:, 3:9:2]
    return {**batch, "labels": labels}


@every_kind
def test_the_loss_by_hand(kind, batch):
    teacher = convert_encoder(encoder(layers=4), length=32, **EFFICIENT[kind])
    student, given = shallow(teacher, [0, 2]), masked(batch)
    own, theirs = (one(**batch, output_hidden_states=True) for one in (student, teacher))
    picked = given["labels"] != -100
    log_q, log_p = ((one.logits[picked] / 2).log_softmax(-1) for one in (own, theirs))
    soft = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    labels = nn.functional.cross_entropy(own.logits[picked], given["labels"][picked])
    h, g = (one.hidden_states[-1][batch["attention_mask"].bool()] for one in (own, theirs))
    cosine = 1 - ((h * g).sum(-1) / (h.norm(dim=-1) * g.norm(dim=-1))).mean()
    torch.testing.assert_close(objective(student, teacher)(given), 5 * soft + 2 * labels + cosine, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_identical_models_have_nothing_to_match(batch):
    teacher = encoder()
    found = objective(teacher, encoder(), masked=0.0)(masked(batch))
    assert abs(found.item()) < 1e-5


@torch.no_grad()
def test_the_cosine_does_not_see_lengths(batch):
    """The last layer's norm doubled: the hidden states are twice as long, and point where they pointed."""
    teacher, student = encoder(), encoder()
    norm = student.bert.encoder.layer[-1].output.LayerNorm
    norm.weight.mul_(2)
    norm.bias.mul_(2)
    assert abs(objective(student, teacher, soft=0.0, masked=0.0)(masked(batch)).item()) < 1e-5
    assert objective(student, teacher, masked=0.0, cosine=0.0)(masked(batch)).item() > 1e-2


# -- entities -------------------------------------------------------------------------------------------------------


def test_the_cards_entities():
    gold, guess = ["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    assert entities(gold) == {(0, 1, "PER"), (3, 3, "LOC")}
    assert entity_f1([gold], [guess]) == 0.5


def test_f1_is_over_entities_of_all_documents():
    one, none = ["B-A", "O", "B-B"], ["O", "O", "O"]
    assert entity_f1([one, none], [one, none]) == 1.0
    assert entity_f1([one], [none]) == 0.0 and entity_f1([none], [none]) == 1.0
    assert entity_f1([one, one], [one, none]) == pytest.approx(2 * 2 / (4 + 2))
    assert entity_f1([["B-A", "B-A"]], [["B-A", "I-A"]]) == 0.0  # two entities, taken for one


def test_an_inside_without_a_beginning_begins_an_entity():
    assert entities(["I-A", "I-A", "O", "B-A", "I-B"]) == {(0, 1, "A"), (3, 3, "A"), (4, 4, "B")}


def test_retention():
    assert retention(0.7, 0.7) == 1.0 and retention(0.45, 0.9) == 0.5


def test_answers_by_hand():
    assert answer_words("The  Eiffel-Tower, (a) tall one.") == ["eiffeltower", "tall", "one"]
    assert answer_f1("the blue whale", "blue whale!") == 1.0 and answer_f1("", "x") == 0.0
    assert answer_f1("a big big dog", "big dog barks") == pytest.approx(2 * 2 / (3 + 3))  # one of the two counts
    exact, f1 = answer_scores(["blue whale", "big dog"], [["a whale", "The blue whale"], ["dog"]])
    assert exact == 0.5 and f1 == pytest.approx((1 + 2 / 3) / 2)


def test_the_first_entity_answers():
    words, tags = ["who", "Ada", "Lovelace", "and", "Bob"], ["O", "B-ANS", "I-ANS", "O", "B-ANS"]
    assert first_answer(words, tags) == "Ada Lovelace" and first_answer(words, ["O"] * 5) == ""


def test_the_front_of_cost_and_score():
    assert pareto([1, 2, 3, 2], [0.5, 0.7, 0.7, 0.6]) == [True, True, False, False]
    assert pareto([1, 1], [0.5, 0.5]) == [True, True]


def test_questions_of_the_users_own(tmp_path):
    file = tmp_path / "asked.jsonl"
    right = {"question": "Who wrote notes?", "context": "It was Ada Lovelace, who wrote.", "answers": ["Ada Lovelace"]}
    file.write_text("\n".join([json.dumps(right)] * 8), encoding="utf-8")
    (first, *_), head = read_questions(str(file)), ["Who", "wrote", "notes?"]
    assert first.words == [*head, "It", "was", "Ada", "Lovelace,", "who", "wrote."] and first.head == 3
    assert first.tags == ["O"] * 5 + ["B-ANS", "I-ANS", "O", "O"] and first.answers == ("Ada Lovelace",)
    assert answer_scores([first_answer(first.words, first.tags)], [first.answers]) == (1.0, 1.0)
    for text, problem in (
        ("{", "line 1: not JSON"),
        ("{}", "line 1: must be"),
        (json.dumps({**right, "answers": ["Bob"]}), "no answer of"),
        (json.dumps({**right, "question": ""}), "has no words"),
        (json.dumps(right), "1 questions"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=problem):
            read_questions(str(file))


# -- what it costs --------------------------------------------------------------------------------------------------


def test_counted_attention_grows_with_the_square_or_with_the_length():
    """A window of 8 of 64 and 128 tokens; all pairs for full attention."""

    def flops(attention: str, length: int, **options: int) -> float:
        model = convert_encoder(encoder(layers=1), attention, length=length, **options)  # type: ignore[arg-type]
        return encoder_cost(model, length, rounds=1)["flops"]

    linear = 2 * (4 * 16 * 16 + 2 * 16 * 32 + 16 * 16 + 16 * 40)  # a token through the layer and the head
    for length in (64, 128):
        assert flops("full", length) == length * linear + 2 * 2 * length**2 * 16
    short, long = (flops("longformer", length, window=8) for length in (64, 128))
    assert long / short == pytest.approx(2, rel=0.05)
    assert long - 128 * linear < flops("full", 128) - 128 * linear


def test_half_of_the_layers_cost_half():
    whole = convert_encoder(encoder(layers=4), length=64, **EFFICIENT["longformer"])
    head = 2 * 64 * (16 * 16 + 16 * 40)
    costs = [encoder_cost(one, 64, rounds=1)["flops"] - head for one in (whole, shallow(whole, [0, 2]))]
    assert costs[1] / costs[0] == pytest.approx(0.5, rel=1e-6)


def test_bigbird_is_put_back_after_a_text_that_is_too_short_for_it():
    model = convert_encoder(encoder(), length=32, **EFFICIENT["bigbird"])
    encoder_cost(model, 16, rounds=1)
    assert model.bert.attention_type == "block_sparse"


def test_peak_bytes_of_tensors_made_inside():
    x = torch.zeros(100)
    with PeakTensors() as memory:
        y = x + 1
        z = y + 1
        del y
        w = z.view(10, 10) + 1  # a view is no new memory
        del z, w
    assert memory.peak == 800 and memory.held == 0


# -- documents ------------------------------------------------------------------------------------------------------

WORDS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi"
)
LEXICON = Lexicon.of([f"{WORDS} psi omega one two three four"])


def test_far_answers_are_far_and_only_the_head_tells():
    for seed in range(20):
        document = make_document("long-ner", 60, LEXICON, random.Random(seed))
        places = [place for place, tag in enumerate(document.tags) if tag != "O"]
        assert min(places) > 30 and len({tag[2:] for tag in document.tags if tag != "O"}) == 1
        kind = next(tag[2:] for tag in document.tags if tag != "O")
        assert document.words[0] == LEXICON.headers[("PER", "LOC", "ORG").index(kind)]
        assert not set(document.words[1:]) & set(LEXICON.headers)


def test_a_question_has_one_answer_after_its_key():
    for seed in range(20):
        document = make_document("retrieval", 60, LEXICON, random.Random(seed))
        assert document.head == 2 and document.tags.count("B-ANS") == 1
        place = document.tags.index("B-ANS")
        assert document.words[place - 1] == document.words[1] and document.words[place - 2] == LEXICON.key
        asked = [i for i, word in enumerate(document.words) if word == LEXICON.key]
        assert [document.words[i + 1] for i in asked].count(document.words[1]) == 1 and place > 30


def test_near_reasons_stand_before_the_name():
    document = make_document("short-ner", 40, LEXICON, random.Random(3))
    for place, tag in enumerate(document.tags):
        if tag.startswith("B-"):
            assert document.words[place - 1] == LEXICON.cues[("PER", "LOC", "ORG").index(tag[2:])]


def test_too_few_words():
    with pytest.raises(DataError, match="3 different words"):
        Lexicon.of(["a b c c"])


def test_words_that_are_several_tokens_have_one_label():
    """And the tokens of the head are global."""
    tokenizer = train_bpe(["find alphabet in the sea " * 20], vocab_size=260)  # hardly more than bytes
    document = Document(["find", "alphabet", "sea", "sea"], ["O", "B-A", "I-A", "O"], head=1)
    rows = encode_tagged([document], ["O", "B-A", "I-A"], tokenizer, 64)
    labels, ids = rows.columns["labels"][0], rows.columns["input_ids"][0]
    scored = (labels != -100).nonzero().flatten().tolist()
    assert labels[scored].tolist() == [0, 1, 2, 0]
    assert int(rows.columns["attention_mask"].sum()) > 8
    starts = [tokenizer.decode(ids[: place + 1]) for place in scored]
    assert [text.strip()[:4] in " ".join(document.words) for text in starts] == [True] * 4
    head = rows.columns["global_attention_mask"][0]
    assert tokenizer.decode(ids[head.bool()]).strip() == "find"
    cut = encode_tagged([document], ["O", "B-A", "I-A"], tokenizer, 6)
    assert (cut.columns["labels"] != -100).sum() < 4  # what does not fit is not scored


def test_a_mixture_of_lengths():
    batch = {"input_ids": torch.arange(1, 33).view(4, 8)}
    mixed = mix_lengths(batch, short=3, share=0.5, pad=0)
    assert mixed["attention_mask"].sum(1).tolist() == [3, 3, 8, 8]
    assert torch.equal(mixed["input_ids"][2:], batch["input_ids"][2:])
    assert (mixed["input_ids"][:2, 3:] == 0).all() and batch["input_ids"].min() == 1


def test_documents_of_the_users_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    line = json.dumps({"tokens": ["Ada", "went"], "tags": ["B-PER", "O"]})
    file.write_text("\n".join([line] * 8), encoding="utf-8")
    assert read_tagged(str(file))[0] == Document(["Ada", "went"], ["B-PER", "O"])
    for text, problem in (
        ("{", "line 1: not JSON"),
        ("{}", "line 1: must be"),
        (json.dumps({"tokens": ["a"], "tags": []}), "1 tokens, 0 tags"),
        (json.dumps({"tokens": ["a"], "tags": ["PER"]}), "'PER' is no BIO tag"),
        (line, "1 documents"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=problem):
            read_tagged(str(file))
    with pytest.raises(DataError, match="no such file"):
        read_tagged(str(tmp_path / "none.jsonl"))


def test_the_papers_values():
    system = EfficientAttentionKD()
    weights = (system.soft_weight, system.masked_weight, system.cosine_weight, system.temperature)
    assert weights == (5.0, 2.0, 1.0, 2.0)
    assert system.length == 4096 and system.short_share == 0.5
