"""The gated activation of a feed-forward block.

    y = silu(gate) · up        silu(g) = g · sigmoid(g)

Contract: contracts/ops/swiglu.yaml. Source: Shazeer 2020, arXiv:2002.05202, eq. 6 (without bias).
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array, array_module, wide
from lora.ops._logistic import sigmoid


class Saved(NamedTuple):
    """Both inputs; the sigmoid is cheaper to compute again than to keep."""

    gate: Array  # [N, F]
    up: Array  # [N, F]


class Grads(NamedTuple):
    """Both inputs are activations."""

    gate: Array  # [N, F] dtype of gate
    up: Array  # [N, F] dtype of up


def forward(gate: Array, up: Array) -> tuple[Array, Saved]:
    """Return y [N, F] in gate's dtype, for `gate` and `up` [N, F]."""
    array_module(gate, up)
    y = sigmoid(wide(gate))
    y *= wide(gate)
    y *= wide(up)
    return y.astype(gate.dtype, copy=False), Saved(gate, up)


def backward(saved: Saved, dy: Array) -> Grads:
    """Return the gradients for gate and up, given `dy` [N, F]."""
    gate, dy = wide(saved.gate), wide(dy)
    open_ = sigmoid(gate)
    silu = gate * open_
    dup = dy * silu
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    dgate = 1 - open_
    dgate *= silu
    dgate += open_
    dgate *= wide(saved.up)
    dgate *= dy
    return Grads(dgate.astype(saved.gate.dtype, copy=False), dup.astype(saved.up.dtype, copy=False))
