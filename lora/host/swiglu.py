"""The gated activation of a feed-forward block, in blocks; lora/ops/swiglu.py is its definition."""

from __future__ import annotations

import numpy as np

from lora.backend import Array, array_module, empty
from lora.host.row_blocks import over_rows
from lora.ops.swiglu import Grads, Saved


def forward(gate: Array, up: Array) -> tuple[Array, Saved]:
    """Return y [N, F] in gate's dtype, for `gate` and `up` [N, F]."""
    array_module(gate, up)
    y = empty(gate.shape, gate.dtype)
    over_rows(_forward, (y,), (gate, up))
    return y, Saved(gate, up)


def backward(saved: Saved, dy: Array) -> Grads:
    """Return the gradients for gate and up, given `dy` [N, F]."""
    grads = Grads(empty(dy.shape, saved.gate.dtype), empty(dy.shape, saved.up.dtype))
    over_rows(_backward, grads, (*saved, dy), temporaries=1)
    return grads


def _forward(y: Array, gate: Array, up: Array) -> None:
    np.negative(gate, out=y)
    # exp may overflow to infinity: gate divided by it is the right limit, 0
    with np.errstate(over="ignore"):
        np.exp(y, out=y)
    y += 1
    np.divide(gate, y, out=y)
    y *= up


def _backward(dgate: Array, dup: Array, gate: Array, up: Array, dy: Array, spare: Array) -> None:
    open_ = np.negative(gate, out=dgate)
    with np.errstate(over="ignore"):
        np.exp(open_, out=open_)
    open_ += 1
    np.divide(1, open_, out=open_)  # twice as fast as np.reciprocal
    silu = np.multiply(gate, open_, out=dup)
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    np.subtract(1, open_, out=spare)
    spare *= silu
    dgate += spare
    dgate *= up
    dgate *= dy
    dup *= dy
