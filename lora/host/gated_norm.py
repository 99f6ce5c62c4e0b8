"""Each head's norm and its gate in one go, in blocks; lora/ops/gated_norm.py is its definition.

What leaves the norm is two multiplications away from x, and is neither written nor kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora.backend import Array, accumulation_dtype, array_module, empty, wide
from lora.host.row_blocks import over_rows, row_blocks
from lora.ops._logistic import sigmoid
from lora.ops.gated_norm import Grads


class Saved(NamedTuple):
    """The inputs, and what each head was divided by."""

    x: Array  # [N, H, W]
    gate: Array  # [N, H, W]
    weight: Array  # [W]
    rstd: Array  # [N, H, 1] accumulation dtype


def forward(x: Array, gate: Array, weight: Array, *, eps: float) -> tuple[Array, Saved]:
    """Return y [N, H, W] in x's dtype, for `x` and `gate` [N, H, W] and `weight` [W].

    Args:
        x: heads of the linear attention.
        gate: what opens them; as wide as x.
        weight: one scale for each dimension of a head.
        eps: added to the mean square, in the unit of x²; from the family contract.
    """
    array_module(x, gate, weight)
    y, rstd = empty(x.shape, x.dtype), empty((*x.shape[:-1], 1), accumulation_dtype(x.dtype))
    scale = weight.astype(rstd.dtype, copy=False)

    def rows(y: Array, rstd: Array, x: Array, gate: Array, normed: Array) -> None:
        np.vecdot(x, x, out=rstd[..., 0])
        rstd /= x.shape[-1]
        rstd += eps
        np.sqrt(rstd, out=rstd)
        np.divide(1, rstd, out=rstd)
        np.multiply(x, rstd, out=normed)
        _one_more_than_exp_of_minus(gate, out=y)
        np.divide(gate, y, out=y)
        y *= normed
        y *= scale

    over_rows(rows, (y, rstd), (x, gate), temporaries=1)
    return y, Saved(x, gate, weight, rstd)


def backward(saved: Saved, dy: Array, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, H, W]."""
    x, gate, weight, rstd = saved
    array_module(x, dy)
    dx, dgate = empty(x.shape, x.dtype), empty(gate.shape, gate.dtype)
    scale = weight.astype(rstd.dtype, copy=False)

    def rows(*blocks: Array) -> None:
        dx, dgate, x, gate, rstd, dy, spare, dscaled = blocks
        _one_more_than_exp_of_minus(gate, out=dgate)
        open_ = np.divide(1, dgate, out=dgate)
        silu = np.multiply(gate, open_, out=dx)
        # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        np.subtract(1, open_, out=spare)
        spare *= silu
        dgate += spare
        np.multiply(dy, scale, out=dscaled)
        dx *= dscaled
        dgate *= dscaled
        normed = np.multiply(x, rstd, out=spare)
        dgate *= normed
        # the projection removes the part of dnormed that would only rescale the head
        normed *= np.vecdot(dx, normed)[..., None] / x.shape[-1]
        dx -= normed
        dx *= rstd

    over_rows(rows, (dx, dgate), (x, gate, rstd, dy), temporaries=2)
    return Grads(dx, dgate, _weight_gradient(saved, dy) if wants_weight else None)


def _one_more_than_exp_of_minus(gate: Array, out: Array) -> None:
    """Write 1 + exp(-gate): what 1 or the gate is divided by, to sigmoid or silu."""
    np.negative(gate, out=out)
    # exp may overflow to infinity: what is divided by it is the right limit, 0
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += 1


def _weight_gradient(saved: Saved, dy: Array) -> Array:
    """Return Σ dy · normed · silu(gate) over tokens and heads, over blocks of tokens in their order."""
    shares = []
    for block in row_blocks(dy):
        gate = wide(saved.gate[block])
        normed = wide(saved.x[block]) * saved.rstd[block]
        shares.append((wide(dy[block]) * normed * gate * sigmoid(gate)).sum(axis=(0, 1)))
    return np.sum(shares, axis=0)
