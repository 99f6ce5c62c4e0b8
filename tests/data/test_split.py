"""The validation split: disjoint, complete, exact in size, and fair to every class."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.data.split import stratified_split
from lora.errors import DataError, ValidationError

LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=60)
PERCENT = st.integers(1, 50)
SEEDS = st.integers(0, 2**32 - 1)


@given(labels=LABELS, percent=PERCENT, seed=SEEDS)
def test_both_sides_are_what_they_must_be(labels: list[int], percent: int, seed: int) -> None:
    train, validation = stratified_split(labels, percent / 100, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert len(validation) == ceil(len(labels) * Fraction(percent, 100))
    assert len(train) >= 1
    sizes, trained = Counter(labels), Counter(labels[i] for i in train)
    assert all(trained[label] for label, size in sizes.items() if size > 1)
    if any(sizes[labels[i]] == 1 for i in validation):
        assert all(trained[label] == 1 for label, size in sizes.items() if size > 1), (
            "something else was left"
        )


@given(labels=LABELS, percent=PERCENT, seed=SEEDS)
def test_every_class_is_held_out_in_proportion(labels: list[int], percent: int, seed: int) -> None:
    _, validation = stratified_split(labels, percent / 100, seed)
    sizes, shares = Counter(labels), Counter(labels[i] for i in validation)
    if min(sizes.values()) > 1:
        for label, size in sizes.items():
            exact = Fraction(size * len(validation), len(labels))
            # one more than the proportion, and no more, where another class had to keep its last row
            assert exact - 1 < shares[label] < exact + 2


def test_the_largest_remainder_decides() -> None:
    labels = [0] * 10 + [1] * 7 + [2] * 3  # 20 % is 4 rows: shares of 2.0, 1.4 and 0.6
    _, validation = stratified_split(labels, 0.2, seed=1)
    assert Counter(labels[i] for i in validation) == {0: 2, 1: 1, 2: 1}


def test_a_class_of_one_row_is_trained_on() -> None:
    labels = [0] * 9 + [1]
    for seed in range(20):
        assert 9 in stratified_split(labels, 0.2, seed)[0]
    train, validation = stratified_split([0, 1], 0.2, seed=0)  # here nothing else is left
    assert (len(train), len(validation)) == (1, 1)


@given(n=st.integers(2, 80), percent=PERCENT, seed=SEEDS)
def test_rows_without_a_class_are_split_alike(n: int, percent: int, seed: int) -> None:
    by_count, by_label = (stratified_split(rows, percent / 100, seed) for rows in (n, [3] * n))
    for one, other in zip(by_count, by_label, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_seed_alone_decides() -> None:
    labels = np.arange(100) % 3
    first, again, other = (stratified_split(labels, 0.2, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_product_is_taken_in_decimals() -> None:
    assert len(stratified_split(100, 0.07, seed=0)[1]) == 7  # in binary, 0.07 * 100 is above 7


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.51, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValidationError, match=r"SSC-026: val_split must be in \(0.0, 0.5\], found"):
        stratified_split(10, fraction, seed=0)


@pytest.mark.parametrize("rows", [0, 1, [], [4]])
def test_too_few_rows_are_refused(rows: object) -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        stratified_split(rows, 0.2, seed=0)
