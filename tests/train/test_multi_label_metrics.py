"""The scores of a classifier of several labels against their definitions, label by label and row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import ShapeError, ValidationError
from lora.train.multi_label_metrics import label_losses, multi_label_metrics, predicted_labels, sigmoid

NAMES = ("a", "b", "c")


def test_a_case_by_hand() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    p = np.array([[0.9, 0.6, 0.1], [0.2, 0.8, 0.1], [0.4, 0.5, 0.0], [0.1, 0.9, 0.2]])
    scores = multi_label_metrics(p, labels, NAMES)
    # predicted: ab, b, nothing (one half is not above one half), b
    assert [(s.name, s.precision, s.recall, s.support) for s in scores.per_class] == [
        ("a", 1.0, 0.5, 2),
        ("b", 2 / 3, 1.0, 2),
        ("c", 0.0, 0.0, 0),
    ]
    assert [s.f1 for s in scores.per_class] == pytest.approx([2 / 3, 0.8, 0.0])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0.8) / 3)
    assert scores.micro_f1 == pytest.approx(2 * 3 / (4 + 4))
    assert (scores.rows, scores.subset_accuracy, scores.none_baseline) == (4, 0.5, 0.25)
    assert scores.hamming_loss == pytest.approx(2 / 12)


@given(rows=st.integers(1, 30), labels=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_counting(rows: int, labels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, truth = rng.random((rows, labels)), rng.integers(0, 2, (rows, labels))
    scores = multi_label_metrics(p, truth, [str(i) for i in range(labels)])
    cells = [
        (c, bool(y), q > 0.5)
        for qs, ys in zip(p, truth, strict=True)
        for c, (q, y) in enumerate(zip(qs, ys, strict=True))
    ]
    f1s = []
    for c, score in enumerate(scores.per_class):
        hits = sum(y and q for k, y, q in cells if k == c)
        said, there = (
            sum(pick(y, q) for k, y, q in cells if k == c) for pick in (lambda y, q: q, lambda y, q: y)
        )
        assert score.precision == pytest.approx(hits / said if said else 0)
        assert score.recall == pytest.approx(hits / there if there else 0)
        f1s.append(2 * hits / (said + there) if said + there else 0)
    assert [score.f1 for score in scores.per_class] == pytest.approx(f1s)
    assert scores.macro_f1 == pytest.approx(sum(f1s) / labels)
    hits, said, there = (
        sum(pick(y, q) for _, y, q in cells)
        for pick in (lambda y, q: y and q, lambda y, q: q, lambda y, q: y)
    )
    assert scores.micro_f1 == pytest.approx(2 * hits / (said + there) if said + there else 0)
    assert scores.subset_accuracy == pytest.approx(
        sum(all((q > 0.5) == y for q, y in zip(*row, strict=True)) for row in zip(p, truth, strict=True))
        / rows
    )
    losses = [
        -math.log(q if y else 1 - q)
        for qs, ys in zip(p, truth, strict=True)
        for q, y in zip(qs, ys, strict=True)
    ]
    assert scores.log_loss == pytest.approx(sum(losses) / len(losses))
    assert np.array_equal(predicted_labels(p), p > 0.5)


def test_probabilities_of_any_logits() -> None:
    p = sigmoid(np.array([[-1e308, -800.0, -1.0], [0.0, 800.0, 1e308]], np.float64))
    assert p[0, 0] == p[0, 1] == 0
    assert p[0, 2] == pytest.approx(1 / (1 + math.e))
    assert p[1].tolist() == [0.5, 1.0, 1.0]
    assert label_losses(np.array([[0.0, 1.0]]), np.array([[1, 0]])).max() < 40
    for wrong in (np.array([[math.nan]]), np.array([0.0])):
        with pytest.raises(ValidationError, match="finite logits"):
            sigmoid(wrong)


@pytest.mark.parametrize(
    ("p", "labels", "error"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), ShapeError),
        (np.zeros((0, 3)), np.zeros((0, 3)), ShapeError),
        (np.zeros(3), np.zeros(3), ShapeError),
        (np.full((1, 3), 1.1), np.zeros((1, 3)), ValidationError),
        (np.full((1, 3), math.nan), np.zeros((1, 3)), ValidationError),
        (np.zeros((1, 3)), np.full((1, 3), 2), ValidationError),
    ],
)
def test_what_does_not_fit_is_refused(p: np.ndarray, labels: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        multi_label_metrics(p, labels, NAMES)


def test_a_name_for_each_label() -> None:
    with pytest.raises(ShapeError, match="2 names"):
        multi_label_metrics(np.zeros((1, 3)), np.zeros((1, 3)), NAMES[:2])
