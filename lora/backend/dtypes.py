"""Precision: what is stored, what is computed, and what is summed in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from lora.errors import UsageError

bfloat16 = np.dtype(ml_dtypes.bfloat16)

_COMPUTE = {"float64": np.dtype("float64"), "float32": np.dtype("float32"), "bfloat16": bfloat16}


def compute_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of activations for `name`, one of "float64", "float32" and "bfloat16".

    Raises:
        UsageError: any other name.
    """
    if name not in _COMPUTE:
        raise UsageError(f"dtype must be one of {', '.join(_COMPUTE)}; got {name!r}")
    return _COMPUTE[name]


def accumulation_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that elements of `dtype` are summed in: float64 stays, all else is float32."""
    return np.dtype("float64") if np.dtype(dtype) == np.float64 else np.dtype("float32")


def wide(array: Any) -> Any:
    """Return `array` in its accumulation dtype, without a copy where it is in it already.

    Reductions go through here: NumPy adds bfloat16 in bfloat16, so that 4,096 ones sum to 256.
    """
    return array.astype(accumulation_dtype(array.dtype), copy=False)
