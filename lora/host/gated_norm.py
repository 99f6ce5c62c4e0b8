"""Each head's norm, then its gate, in blocks; lora/ops/gated_norm.py is its definition."""

from __future__ import annotations

from lora.backend import Array
from lora.host import rmsnorm, swiglu
from lora.ops.gated_norm import Grads, Saved


def forward(x: Array, gate: Array, weight: Array, *, eps: float) -> tuple[Array, Saved]:
    """Return y [N, H, W] in x's dtype, for `x` and `gate` [N, H, W] and `weight` [W].

    Args:
        x: heads of the linear attention.
        gate: what opens them; as wide as x.
        weight: one scale for each dimension of a head.
        eps: added to the mean square, in the unit of x²; from the family contract.
    """
    (normed, _), norm = rmsnorm.forward(x, weight, eps=eps)
    y, gated = swiglu.forward(gate, normed)
    return y.astype(x.dtype, copy=False), Saved(norm, gated)


def backward(saved: Saved, dy: Array, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, H, W]."""
    gated = swiglu.backward(saved.gate, dy)
    norm = rmsnorm.backward(saved.norm, gated.up, wants_weight=wants_weight)
    # one weight serves every head
    return Grads(norm.x, gated.gate, norm.weight.sum(axis=0) if norm.weight is not None else None)
