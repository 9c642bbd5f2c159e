"""Everything that can be wrong with data gives one clear line: what, where, what to do."""

import builtins
import json
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import stillhouse.data.text as text_module
from stillhouse.base.errors import DataError
from stillhouse.data import TextData, load_text, tokenize_windows
from stillhouse.models import train_bpe


def refused(source, *needles: str, **options) -> str:
    """The error of loading ``source``: one line, not too long, with the given words in it."""
    with pytest.raises(DataError) as caught:
        load_text(str(source), **options)
    return checked(str(caught.value), needles)


def checked(message: str, needles) -> str:
    assert "\n" not in message
    assert len(message) < 500
    for needle in needles:
        assert str(needle) in message, f"{needle!r} not in {message!r}"
    return message


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _make(folder):
    folder.mkdir()


def write(path, content: bytes | str):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Where it is


def test_missing_file_suggests_near_names(folder):
    write(folder / "train.jsonl", "{}")
    refused(folder / "trian.jsonl", folder / "trian.jsonl", "no such file", "did you mean 'train.jsonl'?")


def test_missing_folder_is_named(folder):
    refused(folder / "no" / "a.txt", folder / "no", "does not exist", "check the path")


def test_misspelt_demo(monkeypatch, folder):
    monkeypatch.chdir(folder)
    refused("dmeo", "dmeo", "did you mean 'demo'?")


def test_broken_link(folder):
    (folder / "link.txt").symlink_to(folder / "gone.txt")
    refused(folder / "link.txt", folder / "link.txt", "a link to a file that does not exist", "put the link right")


def test_absurd_path():
    refused("x" * 5000, "not a usable path")


def test_unsupported_ending(folder):
    refused(write(folder / "a.csv", "x"), "a.csv", "'.csv'", ".jsonl", "convert it")
    refused(write(folder / "a.jsonl.gz", "x"), "a.jsonl.gz", "unpack it first")


def test_empty_folder(folder):
    refused(folder, folder, "it is empty", ".parquet")
    write(folder / "notes.md", "x")
    refused(folder, "holds only .md")


def test_split_of_a_file_or_folder(folder):
    path = write(folder / "a.txt", "x")
    refused(path, "split='test'", "leave it out", split="test")
    refused(folder, "split='test'", "leave it out", split="test")


def test_no_permission(folder, monkeypatch):
    path = write(folder / "secret.txt", "x")

    def deny(name, *args, **options):
        raise PermissionError(13, "Permission denied", str(name))

    monkeypatch.setattr(text_module, "open", deny, raising=False)
    refused(path, path, "no permission", "chmod u+r")


def test_unreadable_subfolder(folder, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(top / "locked")))

    monkeypatch.setattr(text_module.os, "walk", walk)
    refused(folder, "locked", "no permission", "chmod u+rX")


def test_read_error_of_the_disk(folder, monkeypatch):
    path = write(folder / "a.txt", "x")

    def fail(name, *args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(text_module, "open", fail, raising=False)
    refused(path, path, "Input/output error", "check the disk")
    assert builtins.open is not fail


def test_something_that_is_not_a_file(folder):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s.txt"))
        refused(folder / "s.txt", "s.txt")


# What is in it


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(folder, name, content):
    refused(write(folder / name, content), folder / name, "the file is empty", "give a file with documents")


def test_only_form_feeds(folder):
    refused(write(folder / "a.txt", "\f \f" * 5000), "a.txt", "no documents in it")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_binary_file_given_as_text(folder, name):
    refused(write(folder / name, b"\x7fELF\0\0\1"), folder / name, "binary file", "NUL", "check what the file is")


def test_binary_far_into_a_text_file(folder):
    refused(write(folder / "a.txt", b"x" * 9000 + b"\0"), "a.txt", "NUL byte at byte 9000")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_utf16(folder, name):
    refused(write(folder / name, '{"text": "x"}'.encode("utf-16")), name, "UTF-16", "iconv -f UTF-16 -t UTF-8")


def test_wrong_encoding_says_the_byte(folder):
    raw = "First line\ncafé".encode("latin-1")
    refused(write(folder / "a.txt", raw), "a.txt", f"byte 0xe9 in position {raw.index(0xE9)}", "iconv -f")
    refused(write(folder / "a.json", b'[{"text": "\xe9"}]'), "a.json", "byte 0xe9 in position 11", "iconv -f")


def test_wrong_encoding_in_a_later_document_and_line(folder):
    refused(write(folder / "a.txt", b"abc\fde\xff"), "a.txt document 2", "position 2")
    refused(write(folder / "a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}\n'), "a.jsonl:3", "byte 0xe9 in position 10")


def test_cache_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", write(folder.parent / "file", "x"))
    refused(write(folder / "a.txt", "x"), "a.txt", "cannot be kept in", folder.parent / "file")


# JSON lines


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "a"', "not JSON (EOF while parsing an object at line 1 column 12)"),
        ("not json", "not JSON (expected ident at line 1 column 2)"),
        ('{"text": "a"} {"text": "b"}', "not JSON (trailing characters at line 1 column 15)"),
        ('["a"]', "must be an object"),
        ('"text"', "must be an object"),
        ("17", "must be an object"),
        ("null", "must be an object"),
        ('{"body": "a", "id": 3}', "field 'text': Field required (it has the fields 'body', 'id')"),
        ("{}", "field 'text': Field required (it has no fields)"),
        ('{"text": 5}', "field 'text': Input should be a valid string (it is 5)"),
        ('{"text": null}', "field 'text': Input should be a valid string (it is None)"),
        ('{"text": true}', "field 'text': Input should be a valid string (it is True)"),
        ('{"text": ["a"]}', "field 'text': Input should be a valid string (it is ['a'])"),
        ('{"text": "\\ud800"}', "not JSON (unexpected end of hex escape"),
        ("[" * 200_000, "not JSON (recursion limit exceeded"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON (number out of range"),
    ],
)
def test_broken_line_is_named_with_its_number(folder, line, says):
    path = write(folder / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    refused(path, f"{path}:3: ", says, "on_bad_record=skip")
    assert load_text(str(path), on_bad_record="skip").skipped == 1


def test_first_record_without_text_says_what_is_accepted(folder):
    path = write(folder / "a.jsonl", '{"body": "x"}\n')
    refused(path, f"{path}:1: no text", "'body'", "{prompt, completion}", "text_field")
    refused(path, "field 'txet': Field required", text_field="txet")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": []}, "field 'messages': List should have at least 1 item"),
        ({"messages": "hi"}, "field 'messages': Input should be a valid list (it is 'hi')"),
        ({"messages": [{"role": "user"}]}, "field 'messages.0.content': Field required (it has the fields 'role')"),
        ({"messages": ["hi"]}, "field 'messages.0': Input should be a valid dictionary"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "field 'messages.0.content': Input should be a valid string",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, "field 'messages.0.role': Input should be a valid string"),
        ({"conversations": [{"from": "human", "value": 1}]}, "field 'conversations.0.value': Input should be"),
        ({"prompt": "p", "completion": 1}, "field 'completion': Input should be a valid string"),
        ({"prompt": [], "completion": "c"}, "field 'prompt': Input should be a valid string"),
        ({"instruction": "i", "input": 2, "output": "o"}, "field 'input': Input should be a valid string"),
    ],
)
def test_malformed_conversations(folder, record, says):
    path = write(folder / "a.jsonl", json.dumps(record) + "\n")
    refused(path, f"{path}:1: ", says)


def test_kind_changes_in_the_middle(folder):
    write(folder / "a.jsonl", '{"prompt": "p", "completion": "c"}\n')
    write(folder / "b.txt", "plain")
    refused(folder, "b.txt", "field 'prompt': Field required")


def test_nothing_left_after_skipping(folder):
    path = write(folder / "a.jsonl", "{\n[]\n")
    refused(path, path, "none of 2 records can be used", f"{path}:1", on_bad_record="skip")


def test_wrong_policy(folder):
    refused(write(folder / "a.txt", "x"), "on_bad_record='ignore'", "'skip'", on_bad_record="ignore")


# JSON and Parquet


def test_json_that_is_broken_or_no_list(folder):
    refused(write(folder / "a.json", '[{"text": "a"},\n {"text"]'), "a.json", "not JSON", "line 2 column 9")
    refused(write(folder / "b.json", '"x"'), "b.json:1", "must be an object")
    refused(write(folder / "c.json", '[{"text": "a"}, 5]'), "c.json record 2", "must be an object")
    refused(write(folder / "d.json", "[]"), "d.json", "no documents")
    refused(write(folder / "e.json", '{\n "data": []\n}'), "e.json:1", "not JSON")


def test_corrupt_parquet(folder):
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 100}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    refused(write(folder / "cut.parquet", whole[: len(whole) // 2]), "cut.parquet", "not a readable Parquet file")
    refused(write(folder / "no.parquet", b"hello"), "no.parquet", "write or download it again")
    harmed = bytearray(whole)
    harmed[4:600] = b"\xff" * 596
    refused(write(folder / "harmed.parquet", bytes(harmed)), "harmed.parquet", "not a readable Parquet file")


def test_parquet_without_text_lists_its_columns(folder):
    path = folder / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    refused(path, path, "no text column (columns: body, id)", "text_field=COLUMN")
    refused(path, "no column 'bodies'; did you mean 'body'?", text_field="bodies")
    refused(path, "a.parquet row 1", "field 'id': Input should be a valid string", text_field="id")


# The hub


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_hub_offline(folder, monkeypatch):
    refused("org/no-such-set", "org/no-such-set", "the hub cannot be reached", "pass a local path")
    monkeypatch.chdir(folder.parent)
    write(folder / "corpus", "x")
    refused("data/corpsu", "no such file or folder", "did you mean 'corpus'?")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\non the Hub"), "hf auth login"),
        (ValueError("BuilderConfig 'x' not found.\nAvailable: ['en', 'de']"), "Available: ['en', 'de']"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
    ],
)
def test_hub_errors(monkeypatch, error, says):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refused("a/b:x", "a/b:x", says)


# Windows


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some words to learn from " * 10], vocab_size=280)


def text_data(*texts: str) -> TextData:
    return TextData(datasets.Dataset.from_dict({"text": list(texts)}), "text", "mine.txt", "f")


def refused_windows(data, tokenizer, *needles, **options):
    with pytest.raises(DataError) as caught:
        tokenize_windows(data, tokenizer, **options)
    return checked(str(caught.value), needles)


@pytest.mark.parametrize("texts", [["short"], ["short", "texts"], ["short", "texts", "x" * 90], [""], ["", ""]])
def test_text_shorter_than_the_windows(tokenizer, texts):
    present = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts if text)
    refused_windows(
        text_data(*texts), tokenizer, "mine.txt", f"{present} tokens", "need 128", "smaller window", window=64
    )


def test_too_many_validation_windows(tokenizer):
    data = text_data(*(["some words to learn"] * 20))
    refused_windows(data, tokenizer, "one training and 900 validation windows", window=8, validation=900)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 1}, "window=1"),
        ({"window": 8, "validation": 0}, "validation=0"),
        ({"window": 8, "validation": 1.0}, "validation=1.0"),
        ({"window": 8, "validation": -0.1}, "validation=-0.1"),
    ],
)
def test_options_out_of_range(tokenizer, options, says):
    refused_windows(text_data("some words " * 100), tokenizer, says, **options)


def test_tokenizer_without_eos():
    tokenizer = train_bpe(["a b"], vocab_size=257)
    tokenizer.eos_token = None
    refused_windows(text_data("some words " * 100), tokenizer, "no EOS token", "set tokenizer.eos_token", window=8)


def chat(*conversations: list[tuple[str, str]]) -> TextData:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    return TextData(datasets.Dataset.from_list(rows), "messages", "chat.jsonl", "f")


def test_template_that_refuses_a_conversation(tokenizer):
    picky = train_bpe(["a b"], vocab_size=257)
    picky.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    good = [("user", "a"), ("assistant", "b")]
    data = chat(good, [("system", "s"), *good], good)
    refused_windows(data, picky, "chat.jsonl record 2", "No system role", "change the record", window=32)


def test_all_examples_dropped(tokenizer):
    data = chat([("user", "long " * 100), ("assistant", "b")], [("user", "alone")])
    refused_windows(data, tokenizer, "chat.jsonl", "2 examples, 2 of them dropped", "larger window", window=16)


def test_one_example_cannot_be_split(tokenizer):
    refused_windows(chat([("user", "a"), ("assistant", "b")]), tokenizer, "1 examples", "more data", window=64)
