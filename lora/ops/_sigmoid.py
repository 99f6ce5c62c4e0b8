"""The logistic function, shared by the operations that gate with it."""

from __future__ import annotations

import numpy as np

from lora.backend import Array, array_module


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) in x's dtype; exactly 0 where exp(-x) is beyond the dtype's range."""
    xp = array_module(x)
    # exp may overflow to infinity, whose reciprocal is the right limit, 0
    with np.errstate(over="ignore"):
        y = xp.exp(-x)
    y += 1
    return xp.reciprocal(y, out=y)
