"""Packing loses nothing, lets no target cross a boundary, and can be undone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.packed import IGNORED, Packed, pack, pack_causal, pack_padded, split, to_padded
from lora.errors import ShapeError, ValidationError

SEQUENCES = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=7), min_size=1, max_size=6)
MASK_DTYPES = st.sampled_from(["bool", "int8", "int64", "uint8"])


def padded(sequences: list[list[int]], extra: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, mask), both [S, longest + extra]."""
    columns = max(map(len, sequences)) + extra
    rows = np.full((len(sequences), columns), fill)
    mask = np.zeros_like(rows)
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return rows, mask


@given(sequences=SEQUENCES, extra=st.integers(0, 3), dtype=MASK_DTYPES)
def test_padded_to_packed_to_padded_is_the_identity(sequences: list, extra: int, dtype: str) -> None:
    ids, mask = padded(sequences, extra, fill=55)  # a fill that is also a token: the mask alone decides
    packed = pack_padded(ids, mask.astype(dtype), kind="causal")
    np.testing.assert_array_equal(packed.input_ids, np.concatenate(sequences))
    np.testing.assert_array_equal(packed.lengths, list(map(len, sequences)))
    np.testing.assert_array_equal(to_padded(packed.input_ids, packed.cu_seqlens, ids.shape[1], fill=55), ids)


@given(sequences=SEQUENCES)
def test_every_token_keeps_its_place(sequences: list[list[int]]) -> None:
    packed = pack(sequences)
    assert packed.positions.tolist() == [t for sequence in sequences for t in range(len(sequence))]
    assert (packed.num_sequences, packed.num_tokens) == (len(sequences), sum(map(len, sequences)))
    assert {a.dtype for a in (packed.input_ids, packed.cu_seqlens, packed.positions)} == {np.dtype("int64")}
    assert packed.targets is None
    assert packed.counted == 0


@given(
    sequences=SEQUENCES, ignored=st.lists(st.booleans(), min_size=42, max_size=42), extra=st.integers(0, 2)
)
def test_a_target_is_the_next_label_of_its_sequence(sequences: list, ignored: list[bool], extra: int) -> None:
    drop = iter(ignored)
    labels = [[IGNORED if next(drop) else token + 1000 for token in sequence] for sequence in sequences]
    expected = [target for row in labels for target in [*row[1:], IGNORED]]
    packed = pack_causal(sequences, labels)
    assert packed.targets.tolist() == expected
    assert packed.counted == sum(target != IGNORED for target in expected)
    ids, mask = padded(sequences, extra, fill=0)
    again = pack_padded(ids, mask, padded(labels, extra, fill=IGNORED)[0], kind="causal")
    assert again.targets.tolist() == expected


@given(sequences=SEQUENCES)
def test_without_labels_a_sequence_predicts_itself(sequences: list[list[int]]) -> None:
    packed = pack_causal(sequences)
    assert packed.targets.tolist() == [token for sequence in sequences for token in [*sequence[1:], IGNORED]]


@given(sequences=SEQUENCES, kind=st.sampled_from(["tokens", "classes", "none"]), slack=st.integers(0, 20))
def test_split_cuts_between_sequences_and_loses_nothing(sequences: list, kind: str, slack: int) -> None:
    classes = list(range(len(sequences))) if kind == "classes" else None
    packed = pack_causal(sequences) if kind == "tokens" else pack(sequences, classes)
    max_tokens = max(map(len, sequences)) + slack
    parts = split(packed, max_tokens)
    assert all(part.num_tokens <= max_tokens for part in parts)
    for left, right in pairwise(parts):
        assert left.num_tokens + right.lengths[0] > max_tokens, "a part that could have held more"
    np.testing.assert_array_equal(np.concatenate([part.input_ids for part in parts]), packed.input_ids)
    np.testing.assert_array_equal(np.concatenate([part.positions for part in parts]), packed.positions)
    np.testing.assert_array_equal(np.concatenate([part.lengths for part in parts]), packed.lengths)
    if kind == "none":
        assert all(part.targets is None for part in parts)
    else:
        np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), packed.targets)
        assert sum(part.counted for part in parts) == packed.counted


def test_a_classifier_has_one_target_per_row() -> None:
    packed = pack_padded([[1, 2, 0], [3, 4, 5]], [[1, 1, 0], [1, 1, 1]], [2, 0], kind="classify")
    assert packed.targets.tolist() == [2, 0]
    assert packed.counted == 2
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5]


def test_without_a_mask_every_place_holds_a_token() -> None:
    assert pack_padded([[1, 0], [0, 0]], kind="causal").input_ids.tolist() == [1, 0, 0, 0]


def test_values_of_any_rank_go_back_to_their_rows() -> None:
    values = np.arange(6, dtype="float32").reshape(3, 2)
    back = to_padded(values, np.array([0, 1, 3]), 3, fill=-1)
    assert back.dtype == np.float32
    assert back.tolist() == [[[0, 1], [-1, -1], [-1, -1]], [[2, 3], [4, 5], [-1, -1]]]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[0, 1, 1], [1, 1, 1]], ValidationError, "token after padding in 1 rows, first row 0"),
        ([[1, 1, 1], [1, 0, 1]], ValidationError, "token after padding in 1 rows, first row 1"),
        ([[1, 1, 2], [1, 1, 1]], ValidationError, r"expected 0 and 1, found \[2\]"),
        ([[1, 1, 1], [1, -1, 0]], ValidationError, r"expected 0 and 1, found \[-1\]"),
        (
            [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]],
            ValidationError,
            "attention_mask: expected integers, found float64",
        ),
        ([[1, 1, 1], [0, 0, 0]], ShapeError, "a token in every row, found none in row 1"),
        ([[1, 1], [1, 1]], ShapeError, r"attention_mask: expected \(2, 3\)"),
        ([1, 1, 1], ShapeError, "attention_mask: expected 2 axes"),
    ],
)
def test_a_mask_that_is_not_right_padded_is_refused(mask: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pack_padded([[1, 2, 3], [4, 5, 6]], mask, kind="causal")


@pytest.mark.parametrize(
    ("labels", "kind", "error", "message"),
    [
        (
            [[1, 2, 3], [4, 5, 6]],
            "causal",
            ValidationError,
            "-100 wherever attention_mask is 0, found 1 other",
        ),
        ([[1, 2], [4, 5]], "causal", ShapeError, r"labels: expected shape \(2, 3\)"),
        ([1, 2], "causal", ShapeError, "labels: expected 2 axes"),
        ([[1, 2, 3], [4, 5, -100]], "classify", ShapeError, "labels: expected 1 axes"),
        # as many labels as there are tokens: they must not pass for targets of the tokens
        ([1, 2, 3, 4, 5], "classify", ShapeError, r"labels: expected shape \(2,\)"),
        ([0.0, 1.0], "classify", ValidationError, "labels: expected integers, found float64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list, kind: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pack_padded([[1, 2, 3], [4, 5, 6]], [[1, 1, 1], [1, 1, 0]], labels, kind=kind)


def test_what_cannot_be_packed_is_refused() -> None:
    for sequences in ([], [[1], []]):
        with pytest.raises(ShapeError, match="expected"):
            pack(sequences)
        with pytest.raises(ShapeError, match="expected"):
            pack_causal(sequences)
    with pytest.raises(ShapeError, match="a label for each token"):
        pack_causal([[1, 2]], [[1]])
    with pytest.raises(ValidationError, match="token ids: expected integers"):
        pack([[1.5]])
    with pytest.raises(ShapeError, match="found shape"):
        pack([[1, 2], [3]], [0, 1, 2, 3])


@pytest.mark.parametrize("ends", [[0, 2], [1, 3], [0, 2, 2, 3], [0, 2, 1, 3], [3], []])
def test_boundaries_that_do_not_cut_the_tokens_are_refused(ends: list[int]) -> None:
    with pytest.raises(ShapeError, match="boundaries that rise from 0 to 3"):
        Packed(np.array([1, 2, 3]), np.array(ends, dtype=np.int64))


def test_a_sequence_longer_than_its_place_is_refused() -> None:
    packed = pack([[1, 2, 3], [4]])
    with pytest.raises(ShapeError, match="at most 2 tokens, found one of 3"):
        split(packed, 2)
    with pytest.raises(ShapeError, match="at most 2 tokens, found 3"):
        to_padded(packed.input_ids, packed.cu_seqlens, 2)
