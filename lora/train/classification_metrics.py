"""How well a classifier does: accuracy, precision, recall, F1, calibration, and what guessing would score.

    precision_c = right_c / predicted_c      recall_c = right_c / support_c      F1_c = 2 P R / (P + R)

where 0 / 0 is 0. Definitions are scikit-learn's with zero_division=0; macro-F1 averages over the classes that
occur among the labels or the predictions, as its default does. Calibration: Guo et al. 2017,
arXiv:1706.04599, eq. 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora.errors import ShapeError, ValidationError
from lora.train.probability_scores import (
    Interval,
    bootstrap_interval,
    brier_score,
    cohen_kappa,
    log_loss,
    matthews_correlation,
    top_two_accuracy,
)

CALIBRATION_BINS = 10
MOST_CONFUSIONS = 5


@dataclass(frozen=True)
class ClassScore:
    """One class against all others."""

    name: str
    precision: float  # share of the rows predicted as this class that are of it
    recall: float  # share of the rows of this class that are predicted as it
    f1: float
    support: int  # rows of this class


@dataclass(frozen=True)
class MajorityBaseline:
    """What always answering the most frequent label would score on the same rows."""

    name: str
    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class RandomBaseline:
    """What guessing each class as often as it occurs scores, by the counts that are expected of it."""

    accuracy: float  # Σ_c share_c²
    macro_f1: float  # precision, recall and F1 of class c are its share


@dataclass(frozen=True)
class Confusion:
    """Rows of one class that were taken for another."""

    label: str
    predicted: str
    count: int


@dataclass(frozen=True)
class ClassificationMetrics:
    """A classifier's scores on n rows; every share is in [0, 1]."""

    rows: int
    accuracy: float
    macro_f1: float
    expected_calibration_error: (
        float  # mean distance of confidence from accuracy, over 10 bins, weighted by rows
    )
    per_class: tuple[ClassScore, ...]  # in the order of the head's outputs
    confusion_matrix: tuple[tuple[int, ...], ...]  # [C][C] rows by label, columns by prediction
    majority_baseline: MajorityBaseline
    random_baseline: RandomBaseline
    top_confusions: tuple[Confusion, ...]  # the 5 most frequent, those that occur
    cohen_kappa: float  # in [-1, 1]; this and the next four by `lora.train.probability_scores`
    mcc: float
    log_loss: float  # in nats
    brier_score: float  # summed over the classes, in [0, 2]
    top2_accuracy: float
    accuracy_interval: Interval  # 95 %, of 1,000 bootstrap samples
    macro_f1_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values, under the names of the fields."""
        return asdict(self)


def metrics_from_logits(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
) -> ClassificationMetrics:
    """Return the scores of the softmax of `logits` [n, C]; the rest as in `metrics_from_probabilities`.

    Raises:
        ValidationError: a logit is not finite.
    """
    return metrics_from_probabilities(softmax(logits), labels, class_names)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities [n, C] float64 of logits [n, C].

    Raises:
        ValidationError: a logit is not finite.
    """
    wide = np.asarray(logits, np.float64)
    if wide.ndim != 2 or not np.isfinite(wide).all():
        raise ValidationError(f"expected finite logits [n, C], found {_description(wide)}")
    odds = np.exp(wide - wide.max(axis=1, keepdims=True, initial=-np.inf))
    return odds / odds.sum(axis=1, keepdims=True)


def metrics_from_probabilities(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None = None
) -> ClassificationMetrics:
    """Return the scores of `probabilities` [n, C] against `labels` [n].

    The prediction is the most probable class, the lowest index in a tie; its probability is the confidence.

    Args:
        probabilities: one row per example, each a distribution over C >= 2 classes.
        labels: class indices in [0, C).
        class_names: C names; the indices where not given.

    Raises:
        ShapeError: the arrays or names do not fit together, there is no row, or there are fewer than 2
            classes.
        ValidationError: a row is no distribution (F-CLASS-003), or a label out of range (F-CLASS-002).
    """
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(p, labels)
    names = tuple(map(str, range(p.shape[1]))) if class_names is None else tuple(class_names)
    if len(names) != p.shape[1]:
        raise ShapeError(f"expected a name for each of {p.shape[1]} classes, found {len(names)}")
    predictions = p.argmax(axis=1)
    confusion = _confusion(labels, predictions, len(names))
    precision, recall, f1 = _scores(confusion)
    supports = confusion.sum(axis=1)
    majority = int(supports.argmax())
    guesses = _confusion(labels, np.full_like(labels, majority), len(names))
    return ClassificationMetrics(
        rows=len(labels),
        accuracy=_accuracy(confusion),
        macro_f1=_macro_f1(confusion),
        expected_calibration_error=_calibration_error(p.max(axis=1), predictions == labels),
        per_class=tuple(
            ClassScore(*values)
            for values in zip(names, *(a.tolist() for a in (precision, recall, f1, supports)), strict=True)
        ),
        confusion_matrix=tuple(map(tuple, confusion.tolist())),
        majority_baseline=MajorityBaseline(names[majority], _accuracy(guesses), _macro_f1(guesses)),
        random_baseline=_random_baseline(supports),
        top_confusions=_top_confusions(confusion, names),
        cohen_kappa=cohen_kappa(confusion),
        mcc=matthews_correlation(confusion),
        log_loss=log_loss(p, labels),
        brier_score=brier_score(p, labels),
        top2_accuracy=top_two_accuracy(p, labels),
        accuracy_interval=bootstrap_interval(confusion, _accuracy),
        macro_f1_interval=bootstrap_interval(confusion, _macro_f1),
    )


def _check(p: np.ndarray, labels: np.ndarray) -> None:
    if p.ndim != 2 or labels.shape != p.shape[:1] or p.shape[0] < 1 or p.shape[1] < 2:
        raise ShapeError(
            f"expected probabilities [n, C] and labels [n] of n >= 1 rows and C >= 2 classes; "
            f"found {list(p.shape)} and {list(labels.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= p.shape[1]:
        raise ValidationError(
            f"F-CLASS-002: expected integer labels in [0, {p.shape[1]}), found {_description(labels)}"
        )
    # written so that a NaN fails too
    if not (p.min() >= 0 and np.abs(p.sum(axis=1) - 1).max() <= 1e-5):
        raise ValidationError(
            f"F-CLASS-003: expected rows that sum to 1 within 1e-5, found {_description(p)}"
        )


def _description(array: np.ndarray) -> str:
    range_ = f" between {array.min()} and {array.max()}" if array.size else ""
    return f"{array.dtype} {list(array.shape)}{range_}"


def _confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Return [C, C] int64 counts, rows by label and columns by prediction."""
    flat = labels.astype(np.int64) * classes + predictions
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def _scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (precision, recall, F1), each [C] float64."""
    right, predicted, support = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    # 2 P R / (P + R) in counts, which never divides by the zero of P + R
    return _ratio(right, predicted), _ratio(right, support), _ratio(2 * right, predicted + support)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole [C], 0 where the whole is 0."""
    return part / np.maximum(whole, 1)


def _accuracy(confusion: np.ndarray) -> float:
    return float(confusion.trace() / confusion.sum())


def _macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur as a label or a prediction."""
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
    return float(_scores(confusion)[2][occurs].mean())


def _random_baseline(supports: np.ndarray) -> RandomBaseline:
    shares = supports[supports > 0] / supports.sum()
    return RandomBaseline(float((shares**2).sum()), float(shares.mean()))


def _top_confusions(confusion: np.ndarray, names: Sequence[str]) -> tuple[Confusion, ...]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    cells = [divmod(int(place), len(names)) for place in places]
    return tuple(
        Confusion(names[label], names[predicted], int(wrong[label, predicted]))
        for label, predicted in cells
        if wrong[label, predicted]
    )


def calibration_bin(confidence: np.ndarray) -> np.ndarray:
    """Return which of the equal bins (low, high] of [0, 1] each confidence [n] falls into, [n] integers."""
    edges = np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS
    return np.digitize(confidence, edges, right=True)


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return Σ_b n_b/n · |accuracy_b - confidence_b| over the bins."""
    bins = calibration_bin(confidence)
    # n_b · |accuracy_b - confidence_b| is |Σ right - Σ confidence| over the bin, 0 where it is empty
    gaps = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
