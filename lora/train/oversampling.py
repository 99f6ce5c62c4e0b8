"""Rows of rare classes more than once, so that an epoch shows every class equally often.

Contract: contracts/training/oversampling.yaml. Source: random oversampling, Japkowicz & Stephen 2002, "The
class imbalance problem", section 3.
"""

from __future__ import annotations

import numpy as np

from lora.backend import named_stream


def oversampled(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return row indices, int64 and ascending, that hold each class as often as the largest.

    Every row of a class comes equally often, or once more than another; which ones do is drawn. A class
    without rows has none to repeat.

    Args:
        labels: the class of each training row, [n] integers of 0 or more.
        seed: draws by a random stream of its own.
    """
    counts = np.bincount(labels)
    rng, rows = named_stream(seed, "oversampling"), []
    for c in np.flatnonzero(counts):
        repeats, rest = divmod(int(counts.max()), int(counts[c]))
        of_class = np.flatnonzero(labels == c)
        rows += [np.repeat(of_class, repeats), rng.permutation(of_class)[:rest]]
    return np.sort(np.concatenate(rows))
