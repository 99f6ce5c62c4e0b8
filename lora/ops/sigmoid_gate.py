"""An output that its gate lets through, as Qwen3.5's full attention has it.

    y = x · sigmoid(gate)

Contract: contracts/ops/sigmoid_gate.yaml. Source: Qiu et al. 2025, arXiv:2505.06708.
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array, array_module, wide
from lora.ops._logistic import sigmoid


class Saved(NamedTuple):
    """Both inputs; the sigmoid is cheaper to compute again than to keep."""

    x: Array  # [N, D]
    gate: Array  # [N, D]


class Grads(NamedTuple):
    """Both inputs are activations."""

    x: Array  # [N, D] dtype of x
    gate: Array  # [N, D] dtype of gate


def forward(x: Array, gate: Array) -> tuple[Array, Saved]:
    """Return y in x's dtype, for `x` and `gate` of one shape [N, D]."""
    array_module(x, gate)
    y = sigmoid(wide(gate))
    y *= wide(x)
    return y.astype(x.dtype, copy=False), Saved(x, gate)


def backward(saved: Saved, dy: Array) -> Grads:
    """Return the gradients for x and the gate, given `dy` [N, D]."""
    open_ = sigmoid(wide(saved.gate))
    dx = wide(dy) * open_
    dgate = dx * wide(saved.x)
    dgate *= 1 - open_
    return Grads(dx.astype(saved.x.dtype, copy=False), dgate.astype(saved.gate.dtype, copy=False))
