"""Lines of JSON, with the place each stands in."""

from __future__ import annotations

import json

import pytest

from stillhouse.base.errors import DataError
from stillhouse.data.json_lines import json_lines


def test_objects_and_where_they_stand(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b'{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}')
    assert list(json_lines(file, like="{}")) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 4", {"a": "é"})]


def test_a_line_ends_at_a_newline_alone(tmp_path):
    """Unicode has other ends of a line; in a JSON string they may stand as they are."""
    text = "one\u2028two\u0085three"
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert [row["text"] for _, row in json_lines(tmp_path / "mine.jsonl", like="{}")] == [text]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{broken', r"mine\.jsonl, line 2: not JSON \(Expecting"),
        (b"\n[1]", r"mine\.jsonl, line 2: must be an object such as \{the form\}"),
        (b'{"a": ' + b"[" * 100_000, r"line 1: not JSON"),
        (b'{"a": "\xe9"}', "cannot be read .*give UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, content, said):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(json_lines(tmp_path / "mine.jsonl", like="{the form}"))


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match=r"no such file; did you mean 'mine\.jsonl'\?; give a \.jsonl file .*\{the form\}"
    ):
        list(json_lines(tmp_path / "mime.jsonl", like="{the form}"))
