"""Scores against cases worked by hand, and against scikit-learn's definitions written out as loops."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ShapeError, ValidationError
from lora.train.classification_metrics import metrics_from_logits, metrics_from_probabilities

SIZES = st.tuples(st.integers(1, 40), st.integers(2, 6), st.integers(0, 2**32 - 1))


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [n, C] and labels [n], some classes missing among either."""
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((n, classes)), rng.integers(0, rng.integers(1, classes + 1), n)


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predictions]


def test_a_case_worked_by_hand() -> None:
    # labels      0 0 0 0 1 1 2
    # predictions 0 0 0 1 1 0 1     class 3 occurs nowhere
    metrics = metrics_from_probabilities(
        one_hot([0, 0, 0, 1, 1, 0, 1], 4), np.array([0, 0, 0, 0, 1, 1, 2]), list("abcd")
    )
    assert metrics.confusion_matrix == ((3, 1, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))
    assert metrics.rows == 7
    assert metrics.accuracy == pytest.approx(4 / 7)
    found = [(c.name, c.precision, c.recall, c.f1, c.support) for c in metrics.per_class]
    assert found == [
        ("a", pytest.approx(3 / 4), pytest.approx(3 / 4), pytest.approx(3 / 4), 4),
        ("b", pytest.approx(1 / 3), pytest.approx(1 / 2), pytest.approx(2 / 5), 2),
        ("c", 0.0, 0.0, 0.0, 1),
        ("d", 0.0, 0.0, 0.0, 0),
    ]
    assert metrics.macro_f1 == pytest.approx((3 / 4 + 2 / 5 + 0) / 3)
    # always "a": right in 4 of 7, precision 4/7, recall 1, F1 8/11; "b" and "c" get 0
    assert metrics.majority_baseline.name == "a"
    assert metrics.majority_baseline.accuracy == pytest.approx(4 / 7)
    assert metrics.majority_baseline.macro_f1 == pytest.approx(8 / 11 / 3)
    # every row is sure of itself, and 3 of 7 are wrong
    assert metrics.expected_calibration_error == pytest.approx(3 / 7)


def test_calibration_worked_by_hand() -> None:
    confidence = np.array([0.55, 0.58, 0.75, 0.95, 0.6])
    right = np.array([True, False, True, False, True])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    metrics = metrics_from_probabilities(probabilities, np.where(right, 0, 1))
    # bins (0.5, 0.6]: 3 rows, accuracy 2/3, confidence 1.73/3;  (0.7, 0.8]: 1, 0.75;  (0.9, 1]: 0, 0.95
    assert metrics.expected_calibration_error == pytest.approx((abs(2 - 1.73) + abs(1 - 0.75) + 0.95) / 5)


@pytest.mark.parametrize("tenth", range(1, 11))
def test_a_confidence_on_an_edge_belongs_below_it(tenth: int) -> None:
    edge, just_below = tenth / 10, tenth / 10 - 0.05
    rest = 10 if tenth < 10 else 1  # enough other classes for `edge` to be the largest

    def row(confidence: float) -> list[float]:
        return [confidence] + [(1 - confidence) / (rest * 10)] * (rest * 10)

    probabilities, labels = np.array([row(edge), row(just_below)]), np.array([0, 1])
    # one row right at `edge`, one wrong just below: in one bin they cancel but for the sum of their
    # confidences
    found = metrics_from_probabilities(probabilities, labels).expected_calibration_error
    assert found == pytest.approx(abs(1 - edge - just_below) / 2)


@given(SIZES)
def test_definitions_written_out(sizes: tuple[int, int, int]) -> None:
    logits, labels = drawn(*sizes)
    metrics = metrics_from_logits(logits, labels)
    predictions = [max(range(len(row)), key=lambda c, row=row: (row[c], -c)) for row in logits.tolist()]
    pairs = list(zip(labels.tolist(), predictions, strict=True))
    assert metrics.accuracy == pytest.approx(sum(label == guess for label, guess in pairs) / len(pairs))
    assert metrics.macro_f1 == pytest.approx(macro_f1(pairs))
    for c, score in enumerate(metrics.per_class):
        assert (score.precision, score.recall, score.f1) == pytest.approx(by_definition(pairs, c))
        assert score.support == sum(label == c for label, _ in pairs)
    for row, counts in enumerate(metrics.confusion_matrix):
        for column, count in enumerate(counts):
            assert count == pairs.count((row, column))
    supports = [score.support for score in metrics.per_class]
    majority = supports.index(max(supports))
    guesses = [(label, majority) for label, _ in pairs]
    assert metrics.majority_baseline.name == str(majority)
    assert metrics.majority_baseline.accuracy == pytest.approx(supports[majority] / len(pairs))
    assert metrics.majority_baseline.macro_f1 == pytest.approx(macro_f1(guesses))


def by_definition(pairs: list[tuple[int, int]], c: int) -> tuple[float, float, float]:
    true_positives = sum(label == c and guess == c for label, guess in pairs)
    predicted, support = sum(guess == c for _, guess in pairs), sum(label == c for label, _ in pairs)
    precision = true_positives / predicted if predicted else 0.0
    recall = true_positives / support if support else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def macro_f1(pairs: list[tuple[int, int]]) -> float:
    classes = {c for pair in pairs for c in pair}
    return sum(by_definition(pairs, c)[2] for c in classes) / len(classes)


@given(SIZES)
def test_calibration_written_out(sizes: tuple[int, int, int]) -> None:
    logits, labels = drawn(*sizes)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities, labels, strict=True):
        confidence = float(row.max())
        bins.setdefault(int(np.ceil(confidence * 10)), []).append((confidence, bool(row.argmax() == label)))
    expected = sum(
        len(members)
        / len(labels)
        * abs(np.mean([right for _, right in members]) - np.mean([c for c, _ in members]))
        for members in bins.values()
    )
    assert metrics_from_logits(logits, labels).expected_calibration_error == pytest.approx(
        expected, abs=1e-12
    )


@given(SIZES, st.floats(-1e4, 1e4), st.sampled_from(["float32", "float64"]))
def test_logits_and_their_probabilities_score_alike(
    sizes: tuple[int, int, int], shift: float, dtype: str
) -> None:
    logits, labels = drawn(*sizes)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    shifted = metrics_from_logits((logits.astype(dtype).astype("float64") + shift), labels)
    plain = metrics_from_probabilities(probabilities, labels)
    assert shifted.confusion_matrix == plain.confusion_matrix
    assert shifted.macro_f1 == plain.macro_f1


def test_extreme_logits_stay_finite() -> None:
    metrics = metrics_from_logits(np.array([[1e30, -1e30], [-1e30, 1e30]]), np.array([0, 0]))
    assert (metrics.accuracy, metrics.expected_calibration_error) == (0.5, 0.5)


def test_a_tie_goes_to_the_lower_class() -> None:
    metrics = metrics_from_logits(np.zeros((2, 3)), np.array([2, 1]))
    assert metrics.confusion_matrix == ((0, 0, 0), (1, 0, 0), (1, 0, 0))
    assert metrics.majority_baseline.name == "1"


def test_as_dict_is_json_without_loss() -> None:
    metrics = metrics_from_logits(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([0, 0]), ["safe", "unsafe"])
    read = json.loads(json.dumps(metrics.as_dict()))
    assert read["per_class"][0] == {
        "name": "safe",
        "precision": 1.0,
        "recall": 0.5,
        "f1": 2 / 3,
        "support": 2,
    }
    assert read["confusion_matrix"] == [[1, 1], [0, 0]]
    assert read["majority_baseline"] == {"name": "safe", "accuracy": 1.0, "macro_f1": 1.0}
    assert read["rows"] == 2
    assert list(read) == list(metrics.__dataclass_fields__)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[0.0, np.nan]], [0], ValidationError, "expected finite logits"),
        ([[0.0, np.inf]], [0], ValidationError, "expected finite logits"),
        ([0.0, 1.0], [0], ValidationError, r"expected finite logits \[n, C\], found float64 \[2\]"),
        ([[0.0, 1.0]], [2], ValidationError, r"F-CLASS-002: expected integer labels in \[0, 2\)"),
        ([[0.0, 1.0]], [-1], ValidationError, "F-CLASS-002"),
        ([[0.0, 1.0]], [0.0], ValidationError, "F-CLASS-002"),
        ([[0.0, 1.0]], [0, 1], ShapeError, r"found \[1, 2\] and \[2\]"),
        ([[0.0]], [0], ShapeError, "C >= 2"),
        (np.zeros((0, 2)), np.zeros(0, int), ShapeError, "n >= 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(logits: Any, labels: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        metrics_from_logits(logits, labels)


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1.0], [0.0, 0.0]])
def test_a_row_that_is_no_distribution_is_refused(row: list[float]) -> None:
    with pytest.raises(ValidationError, match="F-CLASS-003"):
        metrics_from_probabilities([row], [0])


def test_names_must_fit_the_classes() -> None:
    with pytest.raises(ShapeError, match="a name for each of 2 classes, found 3"):
        metrics_from_logits([[0.0, 1.0]], [0], list("abc"))
