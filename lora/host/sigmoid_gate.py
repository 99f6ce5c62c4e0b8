"""An output that its gate lets through, in blocks; lora/ops/sigmoid_gate.py is its definition."""

from __future__ import annotations

import numpy as np

from lora.backend import Array, array_module, empty
from lora.host.row_blocks import over_rows
from lora.ops.sigmoid_gate import Grads, Saved


def forward(x: Array, gate: Array) -> tuple[Array, Saved]:
    """Return y in x's dtype, for `x` and `gate` of one shape [N, D]."""
    array_module(x, gate)
    y = empty(x.shape, x.dtype)
    over_rows(_forward, (y,), (x, gate))
    return y, Saved(x, gate)


def backward(saved: Saved, dy: Array) -> Grads:
    """Return the gradients for x and the gate, given `dy` [N, D]."""
    grads = Grads(empty(dy.shape, saved.x.dtype), empty(dy.shape, saved.gate.dtype))
    over_rows(_backward, grads, (*saved, dy), temporaries=1)
    return grads


def _forward(y: Array, x: Array, gate: Array) -> None:
    _sigmoid(gate, out=y)
    y *= x


def _backward(dx: Array, dgate: Array, x: Array, gate: Array, dy: Array, open_: Array) -> None:
    _sigmoid(gate, out=open_)
    np.multiply(dy, open_, out=dx)
    np.subtract(1, open_, out=dgate)
    dgate *= dx
    dgate *= x


def _sigmoid(x: Array, out: Array) -> None:
    np.negative(x, out=out)
    # exp may overflow to infinity: 1 divided by it is the right limit, 0
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1
    np.divide(1, out, out=out)  # twice as fast as np.reciprocal
