"""Which rows train and which validate."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from lora.backend import named_stream
from lora.errors import DataError, ValidationError


def stratified_split(rows: Any, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, validation), the row indices of both sides: int64, ascending.

    Validation gets ceil(n · fraction) rows, the product taken in decimals: 0.07 of 100 is 7. They are shared
    out among the classes in proportion to their size, by largest remainder, the lower class first in a tie. A
    class of two or more rows always keeps one for training, and a class of one row is held out only where
    nothing else is left.

    Args:
        rows: the class of each row, [n] integers; or n, where rows have no class.
        fraction: the share that validates, in (0, 0.5].
        seed: decides which rows of a class are held out, by a random stream of its own.

    Raises:
        ValidationError: `fraction` is out of range (SSC-026).
        DataError: fewer than 2 rows cannot be split.
    """
    if not 0 < fraction <= 0.5:
        raise ValidationError(f"SSC-026: val_split must be in (0.0, 0.5], found {fraction}")
    labels = np.zeros(rows, np.int64) if isinstance(rows, int) else np.asarray(rows)
    n = len(labels)
    if n < 2:
        raise DataError(f"expected at least 2 rows to hold out a validation set, found {n}")
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = _shares(sizes, total=_ceil(n, fraction))
    order = named_stream(seed, "validation split").permutation(n)
    held_out = np.zeros(n, bool)
    for c, share in enumerate(shares):
        held_out[order[classes[order] == c][:share]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _ceil(n: int, fraction: float) -> int:
    # in binary, 0.07 * 100 is a hair above 7
    return math.ceil(n * Fraction(repr(float(fraction))))


def _shares(sizes: np.ndarray, *, total: int) -> np.ndarray:
    """Return how many rows of each class are held out, for classes of `sizes` rows; they sum to `total`."""
    n = sizes.sum()
    # at most half of the rows are held out, and each class of two or more keeps one: there is room for
    # `total`
    room = sizes - 1
    shares = np.minimum(sizes * total // n, room)
    while shares.sum() < total:
        if (shares == room).all():
            room = np.where(sizes > 1, room, 1)
        # sizes * total / n is the exact share; in integers, so that no rounding decides a tie
        missing = np.where(shares < room, sizes * total - shares * n, np.iinfo(np.int64).min)
        shares[np.argmax(missing)] += 1
    return shares
