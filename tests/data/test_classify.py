"""Labels: integers or class names, in range, of one kind, and the same at evaluation as in training."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.classify import read_examples
from lora.errors import DataError, LoraWarning
from tests.data.files import write_jsonl


def rows(*labels: Any) -> list[dict]:
    return [{"input": f"text {i}", "label": label} for i, label in enumerate(labels)]


def refusal(path: Path, content: list[Any], **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(write_jsonl(path / "train.jsonl", content), **arguments)
    return str(caught.value)


@given(labels=st.lists(st.integers(0, 6), min_size=1), spare=st.integers(0, 3))
def test_integer_labels_index_the_classes(labels: list[int], spare: int) -> None:
    with TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "train.jsonl", rows(*labels, 1))
        num_classes = max(*labels, 1) + 1 + spare
        given_ = read_examples(path, num_classes=num_classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoraWarning)  # of the classes between
            inferred = read_examples(path)
    np.testing.assert_array_equal(given_.labels, [*labels, 1])
    assert given_.labels.dtype == np.int64
    assert given_.class_names == tuple(map(str, range(num_classes)))
    assert inferred.class_names == given_.class_names[: num_classes - spare]
    assert given_.texts == tuple(f"text {i}" for i in range(len(labels) + 1))
    assert given_.lines == tuple(range(1, len(labels) + 2))


@given(names=st.lists(st.text(min_size=1), min_size=2, unique=True), picks=st.lists(st.integers(0, 99)))
def test_string_labels_are_sorted_class_names(names: list[str], picks: list[int]) -> None:
    labels = [*names, *(names[pick % len(names)] for pick in picks)]
    with TemporaryDirectory() as folder:
        data = read_examples(write_jsonl(Path(folder) / "train.jsonl", rows(*labels)))
    assert data.class_names == tuple(sorted(names))
    assert [data.class_names[i] for i in data.labels] == labels


def test_an_adapters_classes_decide(tmp_path: Path) -> None:
    names = ("unsafe", "safe", "quoting")  # not sorted: the order of the trained head
    by_name = read_examples(write_jsonl(tmp_path / "a.jsonl", rows("safe", "unsafe")), class_names=names)
    by_index = read_examples(write_jsonl(tmp_path / "b.jsonl", rows(1, 0)), class_names=names)
    for data in (by_name, by_index):
        np.testing.assert_array_equal(data.labels, [1, 0])
        assert data.class_names == names


def test_one_class_is_enough_to_evaluate_a_trained_adapter(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", rows("safe", "safe"))
    np.testing.assert_array_equal(read_examples(path, class_names=("other", "safe")).labels, [1, 1])


def test_extra_fields_are_allowed(tmp_path: Path) -> None:
    extra = [{**row, "id": None, "meta": {"source": [1]}} for row in rows(0, 1)]
    assert read_examples(write_jsonl(tmp_path / "train.jsonl", extra)).texts == ("text 0", "text 1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "line 2: expected the field 'input', found 'label'"),
        ({"input": "a", "labels": 1}, "line 2: expected the field 'label', found 'input', 'labels'"),
        ({}, "line 2: expected the field 'input', found no field"),
        ({"input": 5, "label": 1}, "line 2: 'input': expected a string, found 5"),
        ({"input": ["a"], "label": 1}, "line 2: 'input': expected a string, found a list"),
        ({"input": None, "label": 1}, "line 2: 'input': expected a string, found null"),
        ({"input": "", "label": 1}, "line 2: 'input': expected a text, found an empty string"),
        ({"input": "a", "label": True}, "line 2: 'label': expected an integer or a class name, found true"),
        ({"input": "a", "label": 1.0}, "line 2: 'label': expected an integer or a class name, found 1.0"),
        ({"input": "a", "label": None}, "line 2: 'label': expected an integer or a class name, found null"),
        ({"input": "a", "label": [1]}, "line 2: 'label': expected an integer or a class name, found a list"),
        ({"input": "a", "label": ""}, "line 2: 'label': expected a class name, found an empty string"),
        ({"input": "a", "label": -1}, "F-CLASS-002: label -1 at line 2 out of range (num_classes=2)"),
        (
            {"input": "a", "label": 10**30},
            f"F-CLASS-002: label {10**30} at line 2 out of range (num_classes=2)",
        ),
        (
            {"input": "a", "label": "cat"},
            "line 2: 'label': 'cat', where line 1 has 0; use integers or class names",
        ),
    ],
)
def test_a_bad_row_is_refused_by_its_line(row: dict, message: str, tmp_path: Path) -> None:
    assert f"train.jsonl: {message}" in refusal(tmp_path, [*rows(0), row, *rows(1)])


def test_a_label_out_of_range_is_refused_in_the_words_of_the_contract(tmp_path: Path) -> None:
    found = refusal(tmp_path, rows(0, 5), num_classes=5)
    assert found.endswith("F-CLASS-002: label 5 at line 2 out of range (num_classes=5)")


def test_problems_of_every_kind_are_reported_together_in_order(tmp_path: Path) -> None:
    found = refusal(tmp_path, [*rows(9), "nonsense", {"input": "a"}, *rows("cat", -1, 1)], num_classes=3)
    messages = [line.strip() for line in found.splitlines()]
    assert messages[0].endswith("5 problems")
    expected = (
        "label 9 at line 1 ",
        "Invalid JSONL at line 2:",
        "line 3: ",
        "line 4: 'label': 'cat'",
        "label -1 at line 5 ",
    )
    for message, start in zip(messages[1:], expected, strict=True):
        assert start in message


def test_a_file_of_bad_rows_alone_says_only_that(tmp_path: Path) -> None:
    assert refusal(tmp_path, ["[]"]).endswith("Invalid JSONL at line 1: expected a JSON object, found a list")


def test_an_unknown_class_name_lists_the_known_ones(tmp_path: Path) -> None:
    found = refusal(tmp_path, rows("safe", "sfae"), class_names=("safe", "unsafe"))
    assert found.endswith("label 'sfae' at line 2 is none of the classes safe, unsafe")


@pytest.mark.parametrize("labels", [(0, 0), ("safe", "safe")])
def test_one_class_is_no_classification(labels: tuple, tmp_path: Path) -> None:
    assert "expected at least 2 classes, found 1" in refusal(tmp_path, rows(*labels))


def test_class_names_must_make_num_classes(tmp_path: Path) -> None:
    found = refusal(tmp_path, rows("a", "b"), num_classes=3)
    assert found.endswith("expected num_classes=3, found 2 class names (a, b)")
    found = refusal(tmp_path, rows(0), num_classes=3, class_names=("c", "d"))
    assert found.endswith("expected num_classes=3, found 2 class names (c, d)")


def test_a_label_that_looks_like_an_id_needs_num_classes(tmp_path: Path) -> None:
    assert "label 4711 at line 3 out of range (num_classes=2)" in refusal(tmp_path, rows(0, 1, 4711))
    data = read_examples(write_jsonl(tmp_path / "train.jsonl", rows(0, 1, 4711)), num_classes=4712)
    assert data.labels[2] == 4711
    with pytest.warns(LoraWarning, match=r", 20 and 978 more have no row, of 1000 "):
        assert len(read_examples(write_jsonl(tmp_path / "few.jsonl", rows(0, 999))).class_names) == 1000


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            [0, 1, 5],
            "classes 2, 3, 4 have no row, of 6 from 0 to the largest label; number the labels without gaps",
        ),
        ([2, 0], "class 1 has no row, of 3 .* or give num_classes = 3 if it is meant"),
        ([1, 2], "class 0 has no row, of 3"),
    ],
)
def test_labels_with_gaps_are_said_unless_the_classes_are_counted(
    tmp_path: Path, labels: list[int], said: str
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", rows(*labels))
    with pytest.warns(LoraWarning, match=f"train.jsonl: {said}"):
        read_examples(path)
    # a warning is an error here
    read_examples(path, num_classes=max(labels) + 1)
    read_examples(path, class_names=tuple("abcdef"))
    read_examples(write_jsonl(path, rows(*range(len(labels)))))
