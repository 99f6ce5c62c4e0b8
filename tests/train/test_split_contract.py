"""Attempts to falsify contracts/training/split.yaml."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.data.split import stratified_split
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("split")


class Case(NamedTuple):
    labels: list[int]
    percent: int
    seed: int

    def sides(self, split: Any) -> tuple[list[int], list[int]]:
        train, validation = split(np.array(self.labels), self.percent / 100, self.seed)
        return list(train), list(validation)


def check_every_row_once(split: Any, case: Case) -> None:
    train, validation = case.sides(split)
    assert sorted(train + validation) == list(range(len(case.labels)))
    assert train
    assert validation


def check_size(split: Any, case: Case) -> None:
    _, validation = case.sides(split)
    assert len(validation) == ceil(len(case.labels) * Fraction(case.percent, 100))


def check_classes(split: Any, case: Case) -> None:
    train, validation = case.sides(split)
    sizes, held = Counter(case.labels), Counter(case.labels[row] for row in validation)
    trained = Counter(case.labels[row] for row in train)
    assert all(trained[label] for label, size in sizes.items() if size > 1)
    for label, size in sizes.items():
        assert abs(held[label] - Fraction(size * len(validation), len(case.labels))) < 2


def check_the_seed_decides(split: Any, case: Case) -> None:
    assert case.sides(split) == case.sides(split)
    labels = [row % 2 for row in range(40)]
    assert (
        len({tuple(Case(labels, 25, seed).sides(split)[1]) for seed in range(case.seed, case.seed + 5)}) > 1
    )


CHECKS = {
    "SPLIT-001": check_every_row_once,
    "SPLIT-002": check_size,
    "SPLIT-003": check_classes,
    "SPLIT-004": check_the_seed_decides,
}
ROWS, CLASSES, PERCENT = (CONTRACT.domain[axis] for axis in ("rows", "classes", "percent"))
CASES = st.builds(
    Case,
    st.lists(st.integers(0, CLASSES[1] - 1), min_size=ROWS[0], max_size=ROWS[1]),
    st.integers(*PERCENT),
    seeds,
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(stratified_split, case)


def validates_on_training_rows(labels: Any, fraction: float, seed: int) -> Any:
    _, validation = stratified_split(labels, fraction, seed)
    return np.arange(len(labels)), validation


def loses_a_row(labels: Any, fraction: float, seed: int) -> Any:
    train, validation = stratified_split(labels, fraction, seed)
    return train[1:], validation


def _first(labels: Any, count: int) -> Any:
    rows = np.arange(len(labels))
    return rows[count:], rows[:count]


def ignores_the_classes(labels: Any, fraction: float, seed: int) -> Any:
    train, validation = stratified_split(len(labels), fraction, seed)
    return train, validation


def draws_from_the_clock(labels: Any, fraction: float, seed: int) -> Any:
    return stratified_split(labels, fraction, int(np.random.default_rng().integers(2**32)))


MUTANTS = {
    "validates_on_training_rows": validates_on_training_rows,
    "loses_a_row": loses_a_row,
    "holds_out_nothing": lambda labels, fraction, seed: _first(labels, 0),
    "rounds_down": lambda labels, fraction, seed: _first(labels, int(len(labels) * fraction)),
    "holds_out_the_first_rows": lambda labels, fraction, seed: _first(labels, ceil(len(labels) * fraction)),
    "ignores_the_classes": ignores_the_classes,
    "draws_from_the_clock": draws_from_the_clock,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
