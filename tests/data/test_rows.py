"""Hostile JSON Lines: every bad row is named, and none is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.rows import Row, read_jsonl
from lora.errors import DataError, MissingFileError
from tests.data.files import write_jsonl

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), VALUES)
BLANKS = st.sampled_from(["", "\n", " \t\r\n"])

HOSTILE = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "expected UTF-8, found byte 0xe9 at column 14"),
    "UTF-16": ('{"text": 1}'.encode("utf-16"), "expected UTF-8, found byte 0xff at column 1"),
    "NaN": ('{"x": NaN}', "NaN is not JSON"),
    "Infinity": ('{"x": [-Infinity]}', "-Infinity is not JSON"),
    "overflow": ('{"x": 1e999}', "the number 1e999 does not fit a double"),
    "endless integer": ('{"x": ' + "9" * 5000 + "}", "a number is too long"),
    "duplicate key": ('{"label": 1, "text": "a", "label": 2}', "given twice: 'label'"),
    "nested duplicate key": ('{"x": {"a": 1, "a": 1}}', "given twice: 'a'"),
    "lone surrogate": (r'{"text": "\ud800"}', "half of a surrogate pair"),
    "list": ("[1, 2]", "expected a JSON object, found a list"),
    "string": ('"text"', "expected a JSON object, found a string"),
    "number": ("12", "expected a JSON object, found 12"),
    "null": ("null", "expected a JSON object, found null"),
    "cut off": ('{"text": "a', "Unterminated string"),
    "two objects": ("{} {}", "Extra data at column 4"),
    "single quotes": ("{'text': 'a'}", "Expecting property name"),
    "trailing comma": ('{"text": "a",}', "at column"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@given(rows=st.lists(OBJECTS, min_size=1), ascii_only=st.booleans(), blank=BLANKS)
def test_rows_come_back_as_they_were_written(rows: list[dict], ascii_only: bool, blank: str) -> None:
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" + blank for row in rows)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(text.encode())
        found = read_jsonl(path)
    assert [row.fields for row in found] == rows
    step = 1 + len(blank.splitlines())
    assert [row.line for row in found] == [1 + step * i for i in range(len(rows))]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_refused_by_its_line(name: str, tmp_path: Path) -> None:
    hostile, message = HOSTILE[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine"}, hostile, {"text": "fine"}])
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert "rows.jsonl: Invalid JSONL at line 2: " in str(caught.value)
    assert message in str(caught.value)
    assert "line 3" not in str(caught.value)


def test_all_bad_rows_are_reported_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["{}", "nonsense", "{}", "[]"])
    with pytest.raises(DataError, match=r"rows\.jsonl: 2 problems\n  .*line 2: .*\n  .*line 4: [^\n]*$"):
        read_jsonl(path)


def test_only_the_first_twenty_are_spelled_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["[]"] * 23)
    with pytest.raises(DataError, match="23 problems") as caught:
        read_jsonl(path)
    assert str(caught.value).count("Invalid JSONL") == 20
    assert str(caught.value).endswith("line 20: expected a JSON object, found a list\n  and 3 more")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_a_file_without_rows_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="Training data is empty"):
        read_jsonl(path)


def test_a_byte_order_mark_and_carriage_returns_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_jsonl(path) == [Row(1, {"text": "a"}), Row(2, {"text": "b"})]


def test_a_line_separator_inside_a_string_ends_no_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ['{"text": "a\u2028b\x85c"}', '{"text": "d"}'])
    assert [row.fields["text"] for row in read_jsonl(path)] == ["a\u2028b\x85c", "d"]


def test_a_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [r'{"text": "\ud83d\ude00"}'])
    assert read_jsonl(path)[0].fields == {"text": "\N{GRINNING FACE}"}


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"absent\.jsonl: .* found nothing"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(MissingFileError, match="found a folder"):
        read_jsonl(tmp_path)
