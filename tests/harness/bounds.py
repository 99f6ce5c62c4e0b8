"""Error bounds that are computed from the case, not chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_dtypes import finfo

TINY = {"float64": 1e-300, "float32": 1e-37, "bfloat16": 1e-37}


def gamma(roundings: int, dtype: Any) -> float:
    """Return γ(n) = n·u / (1 - n·u), the relative error of n roundings in `dtype` (Higham 2002, eq. 3.5)."""
    unit = float(finfo(np.dtype(dtype)).eps) / 2
    return roundings * unit / (1 - roundings * unit)


def assert_within(
    actual: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, roundings: int, dtype: Any
) -> None:
    """Fail where |actual - exact| passes γ(roundings) · magnitude, the sum of the absolute terms."""
    error = np.abs(np.asarray(actual, "float64") - exact)
    bound = gamma(roundings, dtype) * np.abs(magnitude) + TINY[str(np.dtype(dtype))]
    worst = np.argmax(error - bound) if error.size else 0
    assert (error <= bound).all(), f"error {error.flat[worst]} over the bound {bound.flat[worst]} at {worst}"


def relative(actual: Any, exact: Any) -> float:
    """Return ‖actual - exact‖ / ‖exact‖, norm-wise over all elements, in float64."""
    exact = np.asarray(exact, "float64")
    difference = np.linalg.norm(np.asarray(actual, "float64").ravel() - exact.ravel())
    return float(difference / max(float(np.linalg.norm(exact.ravel())), 1e-300))
