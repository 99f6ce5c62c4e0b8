"""The logistic function and its integral, shared by the operations that gate with them."""

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


def softplus(x: Array) -> Array:
    """Return log(1 + exp(x)) in x's dtype, by the form that overflows for neither sign."""
    xp = array_module(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))
