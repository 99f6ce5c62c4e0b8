"""Root-mean-square normalisation of each head, then a gate: how Qwen3.5's linear attention leaves its heads.

    y = x · rstd · weight · silu(gate)        rstd = 1 / sqrt(mean(x²) + eps)        over the last axis

The weight is plain here, not zero-centred as in the other norms of the model.

Contract: contracts/ops/gated_norm.yaml. Source: Yang et al. 2024, arXiv:2412.06464.
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array
from lora.ops import rmsnorm, swiglu


class Saved(NamedTuple):
    """The records of the two operations that this one is made of."""

    norm: rmsnorm.Saved
    gate: swiglu.Saved


class Grads(NamedTuple):
    """The weight is frozen unless asked for."""

    x: Array  # [N, H, W] dtype of x
    gate: Array  # [N, H, W] dtype of gate
    weight: Array | None  # [W] accumulation dtype


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
