"""Weights that let rare classes count for more."""

from __future__ import annotations

import numpy as np

IMBALANCE = 2.0  # "auto" weighs classes once the largest has more than this many times the smallest's rows


def class_weights(labels: np.ndarray, num_classes: int, kind: str) -> np.ndarray | None:
    """Return the weight of each class [C] float64, summing to C, or None where all count the same.

    Args:
        labels: the training rows' classes [n].
        num_classes: C.
        kind: "uniform"; "inverse_freq", n / (C · count); "sqrt_inverse", the root of that; or "auto",
            which is sqrt_inverse above an imbalance of 2, and uniform below it or where a class has no row.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if kind == "auto":
        kind = "sqrt_inverse" if counts.min() > 0 and counts.max() > IMBALANCE * counts.min() else "uniform"
    if kind == "uniform":
        return None
    # a class without rows takes part in no sum: any finite weight will do
    weights = len(labels) / (num_classes * np.maximum(counts, 1))
    if kind == "sqrt_inverse":
        weights = np.sqrt(weights)
    return weights * num_classes / weights.sum()
