"""Attempts to falsify contracts/training/oversampling.yaml, and what a run says of its repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.errors import UsageError
from lora.train.callbacks import Callback, Started
from lora.train.finetune import finetune
from lora.train.oversampling import oversampled
from tests.cli.conftest import write_base
from tests.data.files import write_jsonl
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("oversampling")
AXES = CONTRACT.domain
CASES = st.lists(
    st.integers(0, AXES["classes"][1] - 1), min_size=AXES["rows"][0], max_size=AXES["rows"][1]
).map(np.array)


def check_balance(system: Any, labels: np.ndarray) -> None:
    times = np.bincount(system(labels, 3), minlength=len(labels))
    per_class = [times[labels == c] for c in np.unique(labels)]
    assert {int(of_class.sum()) for of_class in per_class} == {int(np.bincount(labels).max())}
    for of_class in per_class:
        assert of_class.min() >= 1
        assert of_class.max() <= of_class.min() + 1


def check_seed(system: Any, labels: np.ndarray) -> None:
    np.testing.assert_array_equal(system(labels, 3), system(labels, 3))
    several = np.repeat([0, 1], [13, 8])
    assert len({str(system(several, seed)) for seed in range(6)}) > 1


CHECKS = {"OVERSAMPLING-001": check_balance, "OVERSAMPLING-002": check_seed}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(labels=CASES)
def test_claim(check: Any, labels: np.ndarray) -> None:
    check(oversampled, labels)


def _drops_the_largest(labels: np.ndarray, seed: int) -> np.ndarray:
    counts = np.bincount(labels)
    fewest = counts[counts > 0].min()
    return np.concatenate([np.flatnonzero(labels == c)[:fewest] for c in np.unique(labels)])


def _repeats_one_row(labels: np.ndarray, seed: int) -> np.ndarray:
    rows = oversampled(labels, seed)
    extra = len(rows) - len(labels)
    rare = np.argmin(np.where(np.bincount(labels) > 0, np.bincount(labels), len(labels) + 1))
    return np.append(np.arange(len(labels)), np.repeat(np.flatnonzero(labels == rare)[0], extra))


def _doubles_the_rare(labels: np.ndarray, seed: int) -> np.ndarray:
    counts = np.bincount(labels)
    return np.repeat(np.arange(len(labels)), np.where(counts[labels] < counts.max(), 2, 1))


def _repeats_the_first_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    return oversampled(labels, 0)


MUTANTS = {
    "drops_the_largest": _drops_the_largest,
    "repeats_one_row": _repeats_one_row,
    "doubles_the_rare": _doubles_the_rare,
    "draws_from_the_clock": lambda labels, seed: oversampled(
        labels, int(np.random.default_rng().integers(99))
    ),
    "repeats_the_first_rows": _repeats_the_first_rows,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    # labels of which the clock's seed decides something
    cases = CASES if check is check_balance else st.just(np.repeat([0, 1], [13, 8]))
    assert_killed(check, mutant, cases)


class Watch(Callback):
    """Keeps what a run says at its start."""

    def started(self, event: Started) -> None:
        """Keep it."""
        self.event = event


def test_a_run_repeats_training_rows_alone_and_says_how_many(tmp_path) -> None:
    base, watch = write_base(tmp_path / "base"), Watch()
    labels = ["a"] * 12 + ["b"] * 4
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"input": f"row {i}", "label": label} for i, label in enumerate(labels)]
    )
    finetune(
        base, data, output=tmp_path / "run", epochs=1, val_split=0.25, oversample=True, callbacks=[watch]
    )
    assert (watch.event.train_rows, watch.event.repeated_rows) == (18, 6)  # 9 of each; b had 3
    assert watch.event.validation_rows == 4
    assert watch.event.class_weights is None  # what is balanced is not weighed too


def test_rows_without_a_class_are_refused(tmp_path) -> None:
    base = write_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(8)])
    with pytest.raises(UsageError, match="oversample"):
        finetune(base, data, output=tmp_path / "run", oversample=True)
    assert not (tmp_path / "run").exists()
