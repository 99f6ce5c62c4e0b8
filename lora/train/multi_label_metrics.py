"""How well a classifier of several labels does: F1 of each label, micro- and macro-averaged, and whole rows.

    precision_c = both_c / predicted_c                    recall_c = both_c / support_c
    F1_c        = 2 both_c / (predicted_c + support_c)    macro-F1 = mean_c F1_c
    micro-F1    = 2 Σ both / Σ (predicted + support)

where 0 / 0 is 0: scikit-learn's definitions with zero_division=0. A label is predicted where its probability
is above one half. Subset accuracy asks for every label of a row to be right, Hamming loss counts the labels
that are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lora.errors import ShapeError, ValidationError
from lora.train.classification_metrics import ClassScore


@dataclass(frozen=True)
class MultiLabelMetrics:
    """The scores of a classifier of several labels on n rows; every share is in [0, 1]."""

    rows: int
    subset_accuracy: float  # share of the rows of which every label is right
    micro_f1: float  # over all labels of all rows together
    macro_f1: float  # mean over the labels, those that never occur included
    hamming_loss: float  # share of all labels of all rows that are wrong
    log_loss: float  # in nats, mean over rows and labels
    none_baseline: float  # subset accuracy of never predicting a label
    per_class: tuple[ClassScore, ...]  # each label, in the order of the head's outputs

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values, under the names of the fields."""
        return asdict(self)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each label, [n, C] float64, for logits [n, C].

    Raises:
        ValidationError: a logit is not finite.
    """
    wide = np.asarray(logits, np.float64)
    if wide.ndim != 2 or not np.isfinite(wide).all():
        raise ValidationError(f"expected finite logits [n, C], found {wide.dtype} {list(wide.shape)}")
    # the half of the curve where the exponential is at most 1; the other one mirrors it
    odds = np.exp(-np.abs(wide))
    return np.where(wide >= 0, 1.0, odds) / (1 + odds)


def predicted_labels(probabilities: np.ndarray) -> np.ndarray:
    """Return which labels are predicted, boolean [n, C]: those above one half."""
    return probabilities > 0.5


def multi_label_metrics(
    probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> MultiLabelMetrics:
    """Return the scores of `probabilities` [n, C] against `labels` [n, C] of 0 and 1.

    Raises:
        ShapeError: the arrays or names do not fit together, or there is no row.
        ValidationError: a probability is outside [0, 1], or a label neither 0 nor 1.
    """
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(p, labels, names)
    truth, predicted = labels == 1, predicted_labels(p)
    both, predictions, support = (a.sum(axis=0) for a in (truth & predicted, predicted, truth))
    f1 = _ratio(2 * both, predictions + support)
    columns = (_ratio(both, predictions), _ratio(both, support), f1, support)
    return MultiLabelMetrics(
        rows=len(labels),
        subset_accuracy=float((truth == predicted).all(axis=1).mean()),
        micro_f1=float(_ratio(2 * both.sum(), (predictions + support).sum())),
        macro_f1=float(f1.mean()),
        hamming_loss=float((truth != predicted).mean()),
        log_loss=float(label_losses(p, labels).mean()),
        none_baseline=float((~truth.any(axis=1)).mean()),
        per_class=tuple(
            ClassScore(*values) for values in zip(names, *(a.tolist() for a in columns), strict=True)
        ),
    )


def label_losses(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -ln of what `p` gives the truth of each label, [n, C] in nats, p at least float64's epsilon."""
    return -np.log(np.maximum(np.where(labels == 1, p, 1 - p), np.finfo(np.float64).eps))


def _check(p: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    if p.ndim != 2 or labels.shape != p.shape or p.size == 0 or len(names) != p.shape[1]:
        raise ShapeError(
            f"expected probabilities and labels [n, C] of n >= 1 rows and C names; "
            f"found {list(p.shape)}, {list(labels.shape)} and {len(names)} names"
        )
    # written so that a NaN fails too
    if not ((p >= 0) & (p <= 1)).all():
        raise ValidationError(f"expected probabilities in [0, 1], found {p.min()} to {p.max()}")
    if not np.isin(labels, (0, 1)).all():
        raise ValidationError(f"expected labels of 0 and 1, found {labels.min()} to {labels.max()}")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where the whole is 0."""
    return part / np.maximum(whole, 1)
