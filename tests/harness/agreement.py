"""A kernel, or the reference in a narrow dtype, against the reference in float64 on the same values."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.harness.bounds import relative

# of the norm of all elements: bfloat16 is rounded to 8 bits on the way, float32 is summed in any order
NORMWISE = {"bfloat16": 6e-3, "float32": 1e-5}


def assert_agrees(actual: Any, exact: Any, what: str, *, dtype: Any = None, terms: Any = None) -> None:
    """Fail unless ‖actual - exact‖ is within the bound of its dtype, times ‖exact‖.

    Args:
        actual: an array of bfloat16 or float32.
        exact: the same in float64.
        what: names the array in the message.
        dtype: whose bound holds, where the array was computed from a narrower one than its own.
        terms: what a difference of large terms is measured by instead of `exact`: their absolute sum.
    """
    assert actual is not None, f"{what}: missing"
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert np.isfinite(np.asarray(actual, "float64")).all() or not np.isfinite(exact).all(), (
        f"{what}: not finite"
    )
    bound = NORMWISE[str(np.dtype(actual.dtype if dtype is None else dtype))]
    error = relative(actual, exact)
    if terms is not None:
        error *= np.linalg.norm(exact) / max(float(np.linalg.norm(terms)), 1e-300)
    assert error <= bound, f"{what}: error {error:.2e} over {bound:.0e}"


def widened(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the same values in float64; None and integers stay."""
    return {
        name: value.astype("float64") if value is not None and value.dtype.kind not in "iub" else value
        for name, value in arrays.items()
    }
