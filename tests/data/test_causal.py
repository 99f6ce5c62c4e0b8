"""Rows of plain text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.data.causal import read_texts
from lora.errors import DataError
from tests.data.files import write_jsonl


def test_texts_come_back_with_their_lines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}, "", {"text": " b\n", "id": 7}])
    data = read_texts(path)
    assert data.texts == ("a", " b\n")
    assert data.lines == (1, 3)


def test_bad_rows_are_reported_together(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": "a"}, {"Text": "b"}, {"text": 3}, "{"]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match="4 problems") as caught:
        read_texts(path)
    expected = (
        "line 1: 'text': expected a text, found an empty string",
        "line 3: expected the field 'text', found 'Text'",
        "line 4: 'text': expected a string, found 3",
        "Invalid JSONL at line 5: ",
    )
    for message, line in zip(expected, str(caught.value).splitlines()[1:], strict=True):
        assert line.strip().startswith(message)
