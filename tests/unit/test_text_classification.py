"""The text classification task: reading labelled text, figures, tokenizers, heads, the embedded language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.data.labelled import load_labelled
from stillhouse.data.toy_languages import KINDS, Shape, borrowing, languages, sentences, vocabulary
from stillhouse.metrics.text_classification import agreement_scores, classification_scores, regression_scores
from stillhouse.models.text_classifier import encode_pieces, load_text_classifier, smaller_config, text_tokenizer
from stillhouse.models.tokenizers import train_bpe
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.objectives.regression import SquaredError
from stillhouse.tasks.text_classification import Examples, demo_labelled

ROWS = [
    {"premise": "a cat", "hypothesis": "an animal", "label": "yes", "idx": 0},
    {"premise": "a dog", "hypothesis": "a stone", "label": "no", "idx": 1},
    {"premise": "a bird", "hypothesis": "a bird", "label": "yes", "idx": 2},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# -- labelled text --------------------------------------------------------------------------------------------------


def test_a_pair_is_found_by_its_columns(tmp_path):
    train, validation = load_labelled(write(tmp_path / "a.jsonl", ROWS))
    assert validation is None
    assert (train.first, train.second) == (["a cat", "a dog", "a bird"], ["an animal", "a stone", "a bird"])
    assert train.classes == ("no", "yes") and train.labels.tolist() == [1, 0, 1]
    single, _ = load_labelled(str(tmp_path / "a.jsonl"), first_field="premise", second_field="none")
    assert single.second is None


def test_a_folder_has_splits_and_secret_labels_are_passed_over(tmp_path):
    write(tmp_path / "train.jsonl", [{"sentence": f"s{n}", "label": n % 2} for n in range(4)])
    write(tmp_path / "validation.jsonl", [{"sentence": "v", "label": -1}])
    write(tmp_path / "test.jsonl", [{"sentence": "t", "label": 1}])
    train, validation = load_labelled(str(tmp_path))
    assert validation is not None and validation.first == ["t"]
    assert train.classes == validation.classes == ("0", "1") and validation.labels.tolist() == [1]


def test_csv_tsv_and_parquet(tmp_path):
    import datasets

    (tmp_path / "a.csv").write_text("text,label\none,3\ntwo,10\n")
    (tmp_path / "a.tsv").write_text("text\tlabel\none\t3\ntwo\t10\n")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    datasets.Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    for ending in ("csv", "tsv"):
        data, _ = load_labelled(str(tmp_path / f"a.{ending}"))
        assert data.classes == ("3", "10") and data.labels.tolist() == [0, 1]
    named, _ = load_labelled(str(tmp_path / "a.parquet"))
    assert named.classes == ("b", "a") and named.labels.tolist() == [1, 0]  # the order of the data set's own names


def test_fractions_are_numbers_to_predict(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": value} for value in (0.5, 3.0, 5.0)]
    data, _ = load_labelled(write(tmp_path / "a.jsonl", rows))
    assert data.classes is None and data.labels.tolist() == [0.5, 3.0, 5.0]
    classes, _ = load_labelled(str(tmp_path / "a.jsonl"), labels="classes")
    assert classes.classes is not None and len(classes.classes) == 3


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a"}], {}, "label_field=COLUMN"),
        ([{"x": "a", "label": 1}], {}, "first_field=COLUMN"),
        (ROWS, {"label_field": "lable"}, "did you mean 'label'"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "at least two classes"),
        ([{"text": "a", "label": 1}, {"text": None, "label": 0}], {}, "row 2 has no text"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {"labels": "numbers"}, "row 1.*not a number"),
        (ROWS, {"split": "trian"}, "did you mean 'train'"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, rows, options, said):
    with pytest.raises(DataError, match=said) as caught:
        load_labelled(write(tmp_path / "a.jsonl", rows), **options)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_labelled(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    with pytest.raises(DataError, match="cannot be read"):
        load_labelled(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match="unknown ending"):
        load_labelled(str(tmp_path / "a.xlsx"))


def test_what_is_held_out_is_the_same_always():
    train, _ = demo_labelled(count=50)
    rest, held = train.held_out(0.2)
    assert (len(rest), len(held)) == (40, 10)
    assert not set(rest.first) & (set(held.first) - set(rest.first))
    assert train.held_out(0.2)[1].first == held.first
    assert rest.few(5, seed=0).first != rest.few(5, seed=1).first


# -- figures --------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    scores = classification_scores(logits, torch.tensor([0, 1, 0, 0]))
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert scores["mcc"] == pytest.approx((1 * 2 - 1 * 0) / (2 * 1 * 3 * 2) ** 0.5)
    assert agreement_scores(logits, logits) == {"agreement": 1.0, "kl": 0.0}
    ranked = regression_scores(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    assert ranked["spearman"] == pytest.approx(1.0) and ranked["pearson"] < 0.95 and ranked["mse"] == 12.0
    assert regression_scores(torch.ones(3), torch.arange(3.0))["pearson"] == 0.0


def test_squared_error_with_labels_and_with_a_teacher():
    term = SquaredError(Observed(torch.nn.Linear(1, 1)).output())
    student = torch.tensor([[1.0], [2.0]])
    assert float(term.compute(student=student, batch={"labels": torch.tensor([1.0, 4.0])})) == 2.0
    assert float(term.compute(student=student, batch={}, teacher=torch.tensor([[1.0], [3.0]]))) == 0.5


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path) -> str:
    tokenizer = word_tokenizer(vocabulary(languages()))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_an_encoder_gets_a_new_head_by_the_seed(encoder):
    one, same, other = (load_text_classifier(encoder, classes=KINDS, seed=seed) for seed in (0, 0, 1))
    assert one.config.id2label == dict(enumerate(KINDS)) and not one.training
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(one.bert.get_parameter(query), other.bert.get_parameter(query))
    with pytest.raises(ModelError, match="no trained head"):
        load_text_classifier(encoder, classes=KINDS)
    assert load_text_classifier(encoder, classes=(), seed=0).config.num_labels == 1


def test_weights_that_are_missing_are_not_made_up(encoder, tmp_path):
    model = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "broken")
    word_tokenizer(["a"]).save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="do not fit"):
        load_text_classifier(str(tmp_path / "broken"), classes=KINDS, seed=0)


def test_sizes(encoder):
    config = load_text_classifier(encoder, classes=KINDS, seed=0).config
    assert smaller_config(config, "layers=1,hidden_size=4,heads=2").num_hidden_layers == 1
    with pytest.raises(ModelError, match="did you mean 'hidden_size'"):
        smaller_config(config, "hidden_sise=4")
    with pytest.raises(ModelError, match="do not divide"):
        smaller_config(config, "hidden_size=5")


def test_a_tokenizer_that_puts_nothing_around_a_text_is_made_to(tmp_path):
    train_bpe(["one two"] * 9, vocab_size=300).save_pretrained(tmp_path)
    tokenizer = text_tokenizer(str(tmp_path))
    ids = tokenizer("one", "two")["input_ids"]
    assert ids[0] == ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 3
    tokenizer.save_pretrained(tmp_path / "again")
    assert text_tokenizer(str(tmp_path / "again"))("one", "two")["input_ids"] == ids


def test_long_text_in_pieces_and_batches_cut_to_their_longest(encoder):
    tokenizer = text_tokenizer(encoder)
    words = languages()[0].words[:10]
    rows = Examples(encode_pieces(tokenizer, [" ".join(words), words[0]], length=6))
    assert len(rows) == 4  # ten words in pieces of four, and one
    found = [n for row in rows.columns["input_ids"].tolist()[:3] for n in row if n not in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(found) == words
    assert rows[[3]]["input_ids"].shape == (1, 3) and rows[[0, 3]]["input_ids"].shape == (2, 6)


# -- the embedded language ------------------------------------------------------------------------------------------


def test_the_label_is_the_kind_of_the_first_noun():
    language = languages()[0]
    kind = {noun: number for number, nouns in enumerate(language.nouns) for noun in nouns}
    texts, labels = sentences(language, 200, "test")
    for text, label in zip(texts, labels, strict=True):
        nouns = [kind[word] for word in text.split() if word in kind]
        assert nouns[0] == label and nouns[1] != label
    assert sentences(language, 5, "test") == (texts[:5], labels[:5])
    assert set(labels) == {0, 1, 2, 3}


def test_languages_share_the_anchors_only():
    one, other = languages(2, Shape(anchors=0.1))
    assert 0 < len(set(one.words) & set(other.words)) < 0.3 * len(one.words)
    assert languages(2)[0] == languages(2)[0] and languages(3)[1] != languages(3)[0]
    none = languages(2, Shape(anchors=0.0))
    assert not set(none[0].words) & set(none[1].words)
    mixed = borrowing(none, 100, "test")
    pure = borrowing(none, 100, "test", rate=0.0)
    assert all(set(text.split()) <= set(none[number % 2].words) for number, text in enumerate(pure))
    assert not all(set(text.split()) <= set(none[number % 2].words) for number, text in enumerate(mixed))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ernie-tiny", {"teacher": "x", "data": "y.jsonl"}),
        ("ernie-tiny", {"corpus": "my.txt"}),
        ("bistil", {"teacher": "x", "data": "y.jsonl"}),
        ("bistil", {"texts": ("demo:0", "my.txt")}),
        ("bistil", {"texts": ("demo:0",)}),
        ("bistil", {"texts": ("demo:0", "demo:9")}),
        ("bistil", {"data": "y.jsonl"}),
    ],
)
def test_demo_text_and_own_text_are_not_mixed(name, values, tmp_path):
    from stillhouse.workflow import run_system

    with pytest.raises(ConfigError):
        run_system(name, {"demo_steps": 1, **values}, output=tmp_path, quiet=True)
