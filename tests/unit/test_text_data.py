"""Documents from files and the windows made of them: content, splits, masks, counts, caching."""

import itertools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import stillhouse.data.encoding as encoding
import stillhouse.data.text as text_module
import stillhouse.data.windows as windows_module
from stillhouse.base.errors import DataError
from stillhouse.data import TextData, load_text, tokenize_windows, tokenizer_fingerprint
from stillhouse.models import train_bpe

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PROSE = [f"Sentence {n} of the story says that {n} bottles stood on wall {n % 7}.\n" * 3 for n in range(60)]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(PROSE, vocab_size=400)


def jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def text_data(texts: list[str], name: str = "made") -> TextData:
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    return TextData(datasets.Dataset(table), "text", name, fingerprint=str(hash(tuple(texts))))


def chat_data(kind: str, rows: list[dict]) -> TextData:
    return TextData(datasets.Dataset.from_list(rows), kind, "made", fingerprint=json.dumps(rows))


# Sources


def test_demo_is_the_documentation_of_python_sorted_by_topic():
    from pydoc_data.topics import topics

    data = load_text("demo")
    assert data.kind == "text"
    assert len(data.documents) == len(topics) > 70
    assert data.documents[0]["text"] == topics[min(topics)]
    assert data.fingerprint == load_text("demo").fingerprint
    assert data.documents["text"][:] == load_text("demo").documents["text"][:]


def test_txt_is_one_document_or_several_between_form_feeds(tmp_path):
    (tmp_path / "one.txt").write_text("a\nb\n")
    (tmp_path / "more.txt").write_bytes("\ufeffé1\f\f  \f2\n".encode())
    assert load_text(str(tmp_path / "one.txt")).documents["text"][:] == ["a\nb\n"]
    assert load_text(str(tmp_path / "more.txt")).documents["text"][:] == ["é1", "2\n"]


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"text": "t"}, "text", {"text": "t"}),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", {"prompt": "p", "completion": "c"}),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "messages",
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            "messages",
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        ),
        (
            {"instruction": "i", "input": "x", "output": "o", "text": "all of it"},
            "prompt-completion",
            {"prompt": "i\n\nx", "completion": "o"},
        ),
        ({"instruction": "i", "input": "", "output": "o"}, "prompt-completion", {"prompt": "i", "completion": "o"}),
        ({"instruction": "i", "output": "o"}, "prompt-completion", {"prompt": "i", "completion": "o"}),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_every_form_of_record_in_every_kind_of_file(tmp_path, record, kind, expected, ending):
    path = tmp_path / f"data{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps([record] if ending == ".json" else record))
    data = load_text(str(path))
    assert data.kind == kind
    assert data.documents[0] == expected


def test_json_file_of_one_object_a_line_is_read_as_lines(tmp_path):
    (tmp_path / "lines.json").write_text('\n{"text": "a"}\n\n{"text": "b"}\r\n')
    assert load_text(str(tmp_path / "lines.json")).documents["text"][:] == ["a", "b"]


def test_text_field_overrides_what_would_be_found(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"body": "b", "text": "t"}])
    assert load_text(source).documents[0] == {"text": "t"}
    assert load_text(source, text_field="body").documents[0] == {"text": "b"}
    assert load_text(source).fingerprint != load_text(source, text_field="body").fingerprint


def test_folder_is_read_in_sorted_order_with_mixed_kinds_of_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("three")
    jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    pq.write_table(pa.table({"text": ["four"], "id": [1]}), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    data = load_text(str(tmp_path))
    assert data.documents["text"][:] == ["one", "two", "three", "four"]


def test_hub_id_with_config_and_split(monkeypatch):
    asked = []

    def fake(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"body": ["a", "b"], "prompt": ["p", "q"], "completion": ["c", "d"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load_text("org/name:de", split="train[:2]")
    assert data.documents[1] == {"prompt": "q", "completion": "d"}
    assert load_text("org/name", text_field="body").documents["text"][:] == ["a", "b"]
    assert asked == [("org/name", "de", "train[:2]"), ("org/name", None, "train")]


def test_hub_rows_with_null_text_are_skipped_on_request(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a", None, "c"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    data = load_text("org/name", on_bad_record="skip")
    assert data.documents["text"][:] == ["a", "c"]
    assert data.skipped_examples == ["org/name row 2: field 'text': Input should be a valid string (it is None)"]


def test_bad_records_are_skipped_counted_and_reported(tmp_path):
    bad = ["{", "7", '{"body": 1}', '{"text": null}', '{"text": ["a"]}', '{"text": "\\ud800"}', "[]"]
    lines = ['{"text": "first"}', *bad, '{"text": "last"}']
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xe9"}\n')
    data = load_text(str(path), on_bad_record="skip")
    assert data.documents["text"][:] == ["first", "last"]
    assert data.skipped == len(bad) + 1
    assert [example.split(": ")[0] for example in data.skipped_examples] == [f"{path}:{n}" for n in range(2, 7)]
    assert f"{len(bad) + 1} bad records skipped (first: {path}:2: not JSON" in data.describe()


def test_first_record_may_be_a_bad_one_when_skipping(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"other": 1}, {"prompt": "p", "completion": "c"}])
    assert load_text(source, on_bad_record="skip").kind == "prompt-completion"


def test_fingerprint_follows_content_not_place(tmp_path):
    one, two, other = (tmp_path / name for name in ("one.txt", "two.txt", "other.txt"))
    one.write_text("a")
    two.write_text("a")
    other.write_text("b")
    prints = [load_text(str(path)).fingerprint for path in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 64


def test_data_is_read_once_and_then_found_in_the_cache(tmp_path, monkeypatch):
    source = jsonl(tmp_path / "big.jsonl", [{"text": f"document {n}"} for n in range(2500)] + [{"text": 5}])
    first = load_text(source, on_bad_record="skip")
    assert first.documents.cache_files
    assert first.documents["text"][2499] == "document 2499"
    monkeypatch.setattr(text_module, "to_document", lambda record, form: pytest.fail("read again"))
    assert (second := load_text(source, on_bad_record="skip")).documents[:] == first.documents[:]
    assert (second.skipped, second.skipped_examples, second.kind) == (1, first.skipped_examples, "text")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"big\.jsonl:2501"):
        load_text(source)


@RELAXED
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=8),
    ascii_only=st.booleans(),
    blank=st.sampled_from(["", "\n", "  \t\n", "\r\n"]),
    mark=st.booleans(),
)
def test_jsonl_round_trips_any_unicode(tmp_path, texts, ascii_only, blank, mark):
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" + blank for text in texts]
    (tmp_path / "any.jsonl").write_bytes(("\ufeff" * mark + "".join(lines)).encode())
    assert load_text(str(tmp_path / "any.jsonl")).documents["text"][:] == texts


@RELAXED
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\f\0"), min_size=1), min_size=1))
def test_txt_round_trips_any_unicode(tmp_path, texts):
    kept = [text for text in texts if text.strip()]
    if not kept:
        return
    kept[0] = kept[0].removeprefix("\ufeff") or "x"
    (tmp_path / "any.txt").write_bytes("\f".join(kept).encode())
    assert load_text(str(tmp_path / "any.txt")).documents["text"][:] == [text for text in kept if text.strip()]


# Windows of text


def stream_of(split) -> list[int]:
    return [int(token) for item in split for token in item["input_ids"]]


@RELAXED
@given(
    texts=st.lists(st.text(max_size=60), min_size=2, max_size=12),
    window=st.integers(2, 9),
    seed=st.integers(0, 5),
)
def test_windows_put_together_are_the_token_stream(tokenizer, texts, window, seed):
    data = text_data(texts)
    try:
        windows = tokenize_windows(data, tokenizer, window=window, seed=seed, validation=0.2)
    except DataError:  # too short, see the tests of bad data
        return
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] if text else [] for text in texts]
    stream = [token for index in np.random.default_rng(seed).permutation(len(texts)) for token in ids[index]]
    train, held_out = stream_of(windows.train), stream_of(windows.validation)
    assert len(train) % window == len(held_out) % window == 0
    assert len(train) + len(held_out) + windows.counts.left_over == len(stream)
    end = stream[: len(train)] == train and any(
        stream[start:][: len(held_out)] == held_out for start in range(len(train), len(stream))
    )
    assert end or (is_made_of_whole_documents(train, ids) and is_made_of_whole_documents(held_out, ids))


def is_made_of_whole_documents(stream: list[int], documents: list[list[int]]) -> bool:
    eos = next(document[-1] for document in documents if document)
    parts = [[]]
    for token in stream:
        parts[-1].append(token)
        if token == eos:
            parts.append([])
    *whole, last = parts
    return all(part in documents for part in whole) and any(document[: len(last)] == last for document in documents)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 40))
def test_enough_is_held_out_and_enough_is_left(lengths, target, least):
    assume(sum(lengths) >= target + least)
    documents, start = windows_module._held_out(np.array(lengths), target, sum(lengths), 1, keep=least)
    inside = sum(np.array(lengths)[documents])
    count = inside - start
    assert target <= count <= inside
    assert sum(lengths) - count >= least
    if count < inside:  # not whole documents, so the end of the stream
        assert documents.tolist() == sorted(documents.tolist())


def test_whole_documents_are_held_out_and_none_is_in_both(tokenizer):
    windows = tokenize_windows(text_data(PROSE), tokenizer, window=16, validation=0.1, seed=3)
    assert windows.counts.left_over < 2 * 16
    eos = tokenizer.eos_token
    held_out = tokenizer.decode(stream_of(windows.validation)).split(eos)
    train = tokenizer.decode(stream_of(windows.train)).split(eos)
    assert set(held_out[:-1]) <= set(PROSE)
    assert set(train[:-1]) <= set(PROSE)
    assert not set(held_out[:-1]) & set(train[:-1])
    share = len(windows.validation) / (len(windows.train) + len(windows.validation))
    assert 0.05 < share < 0.2


def test_seed_decides_the_split_and_nothing_else_does(tokenizer):
    def ids(seed):
        windows = tokenize_windows(text_data(PROSE), tokenizer, window=16, seed=seed)
        return stream_of(windows.train), stream_of(windows.validation), windows.fingerprint

    assert ids(1) == ids(1)
    assert ids(1)[1] != ids(2)[1]
    assert ids(1)[2] != ids(2)[2]


@RELAXED
@given(selection=st.one_of(st.just(0), st.integers(1, 4), st.floats(0.02, 0.3)), seed=st.integers(0, 3))
def test_what_is_chosen_by_is_neither_trained_on_nor_reported(tokenizer, selection, seed):
    plain = tokenize_windows(text_data(PROSE), tokenizer, window=16, validation=0.1, seed=seed)
    windows = tokenize_windows(text_data(PROSE), tokenizer, window=16, validation=0.1, selection=selection, seed=seed)
    assert stream_of(windows.validation) == stream_of(plain.validation)
    assert windows.counts.validation_bytes == plain.counts.validation_bytes
    whole = sorted(stream_of(plain.train))
    parts = sorted(stream_of(windows.train) + stream_of(windows.selection))
    surplus = 16 * selection if isinstance(selection, int) else 0  # of whole documents, beyond the windows asked for
    assert len(whole) - 2 * 16 - surplus < len(parts) <= len(whole) + 16
    if not selection:
        assert len(windows.selection) == 0 and stream_of(windows.train) == stream_of(plain.train)
    elif isinstance(selection, int):
        assert len(windows.selection) == selection
    else:
        assert len(windows.selection) >= max(1, selection * len(plain.train) - 1)
    eos = tokenizer.eos_token
    texts = [set(tokenizer.decode(stream_of(split)).split(eos)[:-1]) for split in (windows.selection, windows.train)]
    assert not {text for text in texts[0] if text in PROSE} & texts[1]


def test_number_of_validation_windows_can_be_set(tokenizer):
    assert len(tokenize_windows(text_data(PROSE), tokenizer, window=16, validation=5).validation) == 5


def test_single_document_gives_its_end(tokenizer):
    text = "".join(PROSE)
    windows = tokenize_windows(text_data([text]), tokenizer, window=16, validation=0.25)
    held_out, train = tokenizer.decode(stream_of(windows.validation)), tokenizer.decode(stream_of(windows.train))
    assert text.startswith(train.split(tokenizer.eos_token)[0])
    assert held_out.split(tokenizer.eos_token)[0] in text[len(text) * 2 // 3 :]
    assert 0.2 < len(windows.validation) / (len(windows.train) + len(windows.validation)) < 0.3


def test_one_huge_document_among_small_ones_stays_in_training(tokenizer):
    windows = tokenize_windows(text_data(["".join(PROSE) * 5, *PROSE[:20]]), tokenizer, window=16, validation=0.05)
    assert len(windows.validation) < 0.15 * len(windows.train)


def test_few_long_documents_give_the_end_of_the_stream(tokenizer):
    texts = ["".join(PROSE[start : start + 12]) for start in range(0, 60, 12)]
    windows = tokenize_windows(text_data(texts), tokenizer, window=16, validation=0.05)
    held_out = tokenizer.decode(stream_of(windows.validation))
    assert any(held_out in text for text in texts)
    assert 0.03 < len(windows.validation) / (len(windows.train) + len(windows.validation)) < 0.06


def test_validation_bytes_are_those_of_the_predicted_tokens(tokenizer):
    texts = ["naïve café — 東京 👩‍🚀 and plain words too. " * 4 + str(n) for n in range(20)]
    windows = tokenize_windows(text_data(texts), tokenizer, window=8, validation=0.2)
    eos = tokenizer.eos_token_id
    alphabet = {token: len(tokenizer.convert_ids_to_tokens(token)) for token in range(len(tokenizer))}
    exact = sum(alphabet[int(t)] for item in windows.validation for t in item["input_ids"][1:] if int(t) != eos)
    assert windows.validation_tokens == 7 * len(windows.validation)
    # a character whose bytes are several tokens counts whole with the first: windows may begin inside one
    assert abs(windows.validation_bytes - exact) <= 3 * len(windows.validation)
    assert windows.bytes_per_token == windows.validation_bytes / windows.validation_tokens


def test_validation_bytes_of_ascii_are_exact(tokenizer):
    windows = tokenize_windows(text_data(PROSE), tokenizer, window=8, validation=0.3)
    decoded = [tokenizer.decode(item["input_ids"][1:], skip_special_tokens=True) for item in windows.validation]
    assert windows.validation_bytes == sum(map(len, decoded))


def test_very_long_documents_are_tokenised_in_pieces(tokenizer, monkeypatch):
    text = "".join(PROSE)
    whole = tokenize_windows(text_data([text, *PROSE]), tokenizer, window=16)
    monkeypatch.setattr(encoding, "PIECE", 300)
    pieces = tokenize_windows(text_data([text, *PROSE]), tokenizer, window=16)
    assert tokenizer.decode(stream_of(whole.train)) == tokenizer.decode(stream_of(pieces.train))
    assert abs(whole.validation_bytes - pieces.validation_bytes) < 100
    assert all("".join(encoding._pieces(t)) == t for t in (text, "x" * 1000, "", "\n" * 700))


def test_items_are_int64_tensors_one_or_many(tokenizer):
    split = tokenize_windows(text_data(PROSE), tokenizer, window=8).train
    rows = [5, len(split) - 1, 17, 5]
    many = split[rows]["input_ids"]
    assert many.shape == (4, 8)
    assert many.dtype == torch.int64
    for at, row in enumerate(rows):
        assert torch.equal(many[at], split[row]["input_ids"])
    assert torch.equal(split[-1]["input_ids"], many[1])
    assert torch.equal(split[3:5]["input_ids"], split[[3, 4]]["input_ids"])
    assert torch.equal(split[np.array([1])]["input_ids"], split[torch.tensor([1])]["input_ids"])
    with pytest.raises(IndexError):
        split[len(split)]


def test_split_works_in_a_data_loader(tokenizer):
    split = tokenize_windows(text_data(PROSE), tokenizer, window=8).train
    batch = next(iter(torch.utils.data.DataLoader(split, batch_size=4)))
    assert torch.equal(batch["input_ids"], split[[0, 1, 2, 3]]["input_ids"])


def test_tokens_are_kept_beside_documents_on_disk(tokenizer, tmp_path, monkeypatch):
    data = load_text(jsonl(tmp_path / "a.jsonl", [{"text": text} for text in PROSE]))
    plain = tokenize_windows(text_data(PROSE), tokenizer, window=8)
    first = tokenize_windows(data, tokenizer, window=8)
    monkeypatch.setattr(windows_module, "encode_documents", lambda *args: pytest.fail("tokenised again"))
    again = tokenize_windows(data, tokenizer, window=8)
    assert stream_of(plain.train) == stream_of(first.train) == stream_of(again.train)
    assert plain.counts == first.counts == again.counts


def test_fingerprint_depends_on_all_that_matters(tokenizer):
    other = train_bpe(PROSE, vocab_size=300)
    data = text_data(PROSE)
    options = [{}, {"window": 9}, {"seed": 1}, {"validation": 0.2}]
    prints = [tokenize_windows(data, tokenizer, **{"window": 8, **option}).fingerprint for option in options]
    prints.append(tokenize_windows(data, other, window=8).fingerprint)
    prints.append(tokenize_windows(text_data(PROSE[1:]), tokenizer, window=8).fingerprint)
    assert len(set(prints)) == len(prints)


def test_tokenizer_fingerprint_ignores_how_it_was_called(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before != tokenizer_fingerprint(train_bpe(PROSE, vocab_size=300))


def test_a_tokenizer_that_puts_bos_first_gets_it_at_every_document():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_bpe(PROSE, vocab_size=300, special_tokens=("</s>", "<s>"))
    tokenizer.bos_token = "<s>"
    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    windows = tokenize_windows(text_data(PROSE), tokenizer, window=8)
    stream = stream_of(windows.train)
    assert stream[0] == bos
    follows = {after for before, after in itertools.pairwise(stream) if before == tokenizer.eos_token_id}
    assert follows == {bos}


# Windows of conversations


PAIRS = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(20)]
TURNS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"Say {n}"},
            {"role": "assistant", "content": f"Gladly: {n}"},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Welcome"},
        ]
    }
    for n in range(20)
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS = (  # like reasoning models: the prompt ends with an opened thought, which later turns leave out
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
)


def responses(tokenizer, item) -> str:
    return tokenizer.decode(item["input_ids"][item["loss_mask"] == 1])


@pytest.fixture
def chat_tokenizer():
    tokenizer = train_bpe(PROSE, vocab_size=400, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = CHATML
    return tokenizer


def test_mask_is_on_responses_only_without_a_chat_template(tokenizer):
    windows = tokenize_windows(chat_data("prompt-completion", PAIRS), tokenizer, window=64, validation=3)
    assert (len(windows.train), len(windows.validation)) == (17, 3)
    seen = set()
    for item in itertools.chain(windows.train, windows.validation):
        assert item["input_ids"].shape == item["loss_mask"].shape == item["attention_mask"].shape == (64,)
        text = tokenizer.decode(item["input_ids"][item["attention_mask"] == 1])
        assert text.startswith("### User:\nWhat is ")
        assert "\n\n### Assistant:\nIt is" in text
        seen.add(responses(tokenizer, item))
    assert seen == {f"It is {n + 1}.<|endoftext|>" for n in range(20)}


def test_mask_is_on_every_assistant_turn_with_its_end_marker(chat_tokenizer):
    windows = tokenize_windows(chat_data("messages", TURNS), chat_tokenizer, window=128)
    found = {responses(chat_tokenizer, item) for item in itertools.chain(windows.train, windows.validation)}
    assert found == {f"Gladly: {n}<|im_end|>Welcome<|im_end|>" for n in range(20)}


def test_a_turn_that_the_template_later_rewrites_is_context(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ '<assistant>short</>' }}"
        "{% else %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    windows = tokenize_windows(chat_data("messages", TURNS), chat_tokenizer, window=128)
    assert {responses(chat_tokenizer, item) for item in windows.train} == {"Welcome</>"}


def test_a_generation_prompt_that_opens_a_thought(chat_tokenizer):
    chat_tokenizer.chat_template = THINKS
    windows = tokenize_windows(chat_data("prompt-completion", PAIRS), chat_tokenizer, window=128)
    assert all(responses(chat_tokenizer, item).endswith(".</>") for item in windows.train)
    assert all(responses(chat_tokenizer, item).startswith("It is") for item in windows.train)


def test_long_examples_lose_their_end_or_are_dropped(tokenizer):
    rows = [*PAIRS, {"prompt": "x", "completion": "long " * 200}, {"prompt": "long " * 200, "completion": "x"}]
    rows.append({"prompt": "y", "completion": ""})
    windows = tokenize_windows(chat_data("prompt-completion", rows), tokenizer, window=64, validation=2)
    assert windows.counts.truncated == 1
    assert windows.counts.dropped == 1
    assert len(windows.train) + len(windows.validation) == 22
    full = [item for item in windows.train if int(item["attention_mask"].sum()) == 64]
    assert len(full) <= 1


def test_conversations_without_a_response_are_dropped(chat_tokenizer):
    rows = [*TURNS, {"messages": [{"role": "user", "content": "alone"}]}]
    windows = tokenize_windows(chat_data("messages", rows), chat_tokenizer, window=128)
    assert windows.counts.dropped == 1


def test_counts_of_conversations_are_of_responses(tokenizer):
    windows = tokenize_windows(chat_data("prompt-completion", PAIRS), tokenizer, window=64, validation=5)
    assert windows.validation_tokens == sum(int(item["loss_mask"].sum()) for item in windows.validation)
    texts = [responses(tokenizer, item).removesuffix("<|endoftext|>") for item in windows.validation]
    assert windows.validation_bytes == sum(map(len, texts))
    assert windows.kind == "prompt-completion"


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """A model that gives every token 1/V needs log2(V) bits a token, whatever the bytes."""
    windows = tokenize_windows(text_data(PROSE), tokenizer, window=16)
    nats = math.log(len(tokenizer)) * windows.validation_tokens
    bits_per_byte = nats / math.log(2) / windows.validation_bytes
    assert bits_per_byte == pytest.approx(math.log2(len(tokenizer)) / windows.bytes_per_token)
