"""Rows with any number of labels: what is read, what is refused, and how labels travel in a packed batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.classify import ClassifyData, read_multi_label
from lora.data.packed import pack, pack_padded, split
from lora.data.packing import micro_batches
from lora.errors import DataError, LoraWarning, ShapeError
from lora.train.examples import data_hash, detect_task, read_data
from tests.data.files import write_jsonl


def read(folder: Path, *labels: Any, **named: Any) -> ClassifyData:
    rows = [{"input": f"text {i}", "labels": found} for i, found in enumerate(labels)]
    return read_multi_label(write_jsonl(folder / "rows.jsonl", rows), **named)


def test_names_are_those_of_all_rows_in_order(tmp_path: Path) -> None:
    data = read(tmp_path, ["b", "a"], [], ["c"])
    assert data.class_names == ("a", "b", "c")
    assert data.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert (data.labels.dtype, data.lines, data.is_multi_label) == ("int64", (1, 2, 3), True)
    assert [data.names_of(row) for row in range(3)] == [["a", "b"], [], ["c"]]


def test_integers_are_indices(tmp_path: Path) -> None:
    with pytest.warns(LoraWarning, match="class 1 has no row, of 3"):
        data = read(tmp_path, [2], [], [0, 2])
    assert data.class_names == ("0", "1", "2")
    assert data.labels.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert read(tmp_path, [0], num_classes=4).labels.tolist() == [[1, 0, 0, 0]]


def test_the_names_of_a_trained_head_are_kept(tmp_path: Path) -> None:
    names = ("z", "a", "unseen")
    assert read(tmp_path, ["a"], ["z"], class_names=names).labels.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert read(tmp_path, [0], class_names=names).labels.tolist() == [[1, 0, 0]]
    with pytest.raises(DataError, match="F-CLASS-002: label 'b' at line 1"):
        read(tmp_path, ["b"], class_names=names)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([["a", "a"], ["b"]], "line 1: 'labels': expected each label once, found more of 'a'"),
        ([[1, 0], [2, 1, 2]], "line 2: .*more of 2"),
        ([["a"], "b"], "line 2: 'labels': expected a list of integers or class names, found a string"),
        ([["a"], None], "line 2: .*found null"),
        ([["a"], ["b", True]], "line 2: 'labels': expected an integer or a class name, found true"),
        ([["a"], ["b", 1.5]], "line 2: .*found 1.5"),
        ([["a", ""], ["b"]], "line 1: 'labels': .*empty string"),
        ([["a"], ["b", 3]], "use integers or class names throughout"),
        ([[0, -1], [1]], "F-CLASS-002: label -1 at line 1 out of range"),
        ([[0, 10**9], [1]], "F-CLASS-002: label 1000000000 at line 1"),
        ([["a"], []], "expected at least 2 classes, found 1"),
        ([[], []], "expected at least 2 classes, found 0"),
    ],
)
def test_what_is_wrong_is_said_by_line(tmp_path: Path, labels: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, *labels)


def test_all_bad_rows_are_listed_with_those_that_lack_the_field(tmp_path: Path) -> None:
    rows = [
        {"input": "a", "labels": ["x", "y"]},
        {"input": "a", "label": "x"},
        {"input": "", "labels": []},
        {"input": "a", "labels": [{}]},
    ]
    with pytest.raises(DataError) as raised:
        read_multi_label(write_jsonl(tmp_path / "rows.jsonl", rows))
    message = str(raised.value)
    assert "3 problems" in message
    assert all(f"line {line}: " in message for line in (2, 3, 4))


def test_the_first_row_says_which_kind_a_file_is(tmp_path: Path) -> None:
    several = write_jsonl(
        tmp_path / "several.jsonl", [{"input": "a", "labels": [0, 1]}, {"input": "b", "labels": []}]
    )
    one = write_jsonl(tmp_path / "one.jsonl", [{"input": "a", "label": 0}, {"input": "b", "label": 1}])
    both = write_jsonl(
        tmp_path / "both.jsonl", [{"input": f"{i}", "label": i, "labels": [i]} for i in range(2)]
    )
    for path, ndim in ((several, 2), (one, 1), (both, 1)):
        assert detect_task(path) == "classify"
        assert read_data(path, "classify").labels.ndim == ndim
    assert read_data(both, "classify", multi_label=True).labels.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(DataError, match="expected the field 'labels'"):
        read_data(one, "classify", multi_label=True)


def test_the_hash_knows_every_label_and_no_order_of_rows(tmp_path: Path) -> None:
    first = read(tmp_path, ["a", "b"], ["b"], [])
    same = read(tmp_path, ["b", "a"], ["b"], [])
    other = read(tmp_path, ["a"], ["b"], [])
    assert data_hash(first) == data_hash(same) != data_hash(other)
    turned = ClassifyData(first.texts[::-1], first.labels[::-1], first.class_names, first.lines)
    assert data_hash(turned) == data_hash(first)


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=8)


@given(lengths=lengths, budget=st.integers(5, 12), labels=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
def test_labels_stay_with_their_sequence(lengths: list[int], budget: int, labels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # the first token of a sequence is its number, so that a part tells which rows it holds
    sequences = [np.r_[i, rng.integers(0, 9, length - 1)] for i, length in enumerate(lengths)]
    targets = rng.integers(0, 2, (len(lengths), labels))
    batch = pack(sequences, targets)
    assert batch.counted == len(lengths)
    parts = [split(batch, budget), micro_batches([batch], budget), micro_batches([batch], 0, packing=False)]
    for cut in parts:
        seen = []
        for part in cut:
            numbers = part.input_ids[part.cu_seqlens[:-1]]
            np.testing.assert_array_equal(part.targets, targets[numbers])
            seen += numbers.tolist()
        assert sorted(seen) == list(range(len(lengths)))


def test_padding_is_taken_out_and_labels_are_kept() -> None:
    ids, mask = np.array([[5, 6, 0], [7, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0]])
    batch = pack_padded(ids, mask, [[0, 1], [1, 1]], kind="multi_label")
    assert (batch.input_ids.tolist(), batch.targets.tolist()) == ([5, 6, 7], [[0, 1], [1, 1]])
    with pytest.raises(ShapeError, match="labels"):
        pack_padded(ids, mask, [[0, 1]], kind="multi_label")
    with pytest.raises(ShapeError, match="labels: expected 2 axes"):
        pack_padded(ids, mask, [0, 1], kind="multi_label")
    with pytest.raises(ShapeError, match="a target for each of"):
        pack([[5, 6], [7]], [[0, 1]])
