"""Rotary position embedding after the norms of the heads, in blocks; lora/ops/rope.py is its definition."""

from __future__ import annotations

import numpy as np

from lora.backend import Array, empty
from lora.host import rmsnorm
from lora.host.row_blocks import over_rows
from lora.ops.rope import Grads, Saved, angles, check_width

__all__ = ["angles", "backward", "forward"]


def forward(
    q: Array,
    k: Array,
    cos: Array,
    sin: Array,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    *,
    eps: float = 0.0,
) -> tuple[tuple[Array, Array], Saved]:
    """Return ((q, k), Saved), normalised where norms are given, then rotated, in the dtype of each input.

    Args:
        q: [N, H, E] queries.
        k: [N, G, E] keys.
        cos: [N, r/2] from `angles`, r <= E.
        sin: [N, r/2] likewise.
        q_norm: [E] zero-centred weight of the norm of each query head, or None.
        k_norm: [E] likewise for key heads.
        eps: of those norms, in the unit of their input squared.

    Raises:
        ShapeError: a head is narrower than the part that is to be rotated.
    """
    check_width(q, k, cos, sin, q_norm, k_norm)
    q, q_normed = _normed(q, q_norm, eps)
    k, k_normed = _normed(k, k_norm, eps)
    return _rotated(q, k, cos, sin), Saved(cos, sin, q_normed, k_normed)


def backward(saved: Saved, dq: Array, dk: Array, *, wants_norms: bool = False) -> Grads:
    """Return the gradients, given `dq` [N, H, E] and `dk` [N, G, E] for the rotated arrays."""
    dq, dk = _rotated(dq, dk, saved.cos, -saved.sin)
    dq, dq_norm = _unnormed(saved.q_normed, dq, wants_norms)
    dk, dk_norm = _unnormed(saved.k_normed, dk, wants_norms)
    return Grads(dq, dk, dq_norm, dk_norm)


def _rotated(q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Rotate the pairs of both [N, heads, E] by the angles [N, r/2]; a rotation by -sin undoes one by sin."""
    if q.shape[1] < k.shape[1]:  # blocks are cut by the array with more heads
        k, q = _rotated(k, q, cos, sin)
        return q, k
    outputs = empty(q.shape, q.dtype), empty(k.shape, k.dtype)

    def rows(q_out: Array, k_out: Array, q: Array, k: Array, cos: Array, sin: Array, spare: Array) -> None:
        along = np.concatenate([cos, cos], axis=1)[:, None]
        across = np.concatenate([sin, -sin], axis=1)[:, None]
        for y, x in ((q_out, q), (k_out, k)):
            _rotate(y, x, along, across, spare[:, : x.shape[1]])

    over_rows(rows, outputs, (q, k, cos, sin), temporaries=1)
    return outputs


def _rotate(y: Array, x: Array, along: Array, across: Array, spare: Array) -> None:
    """Write the rotated `x` into `y`: what each half gives to itself, and what the other half gives to it.

    Rows of r elements, not of r/2: there are few of them, and each costs NumPy a loop of its own.
    """
    width = along.shape[-1]
    halves = (*x.shape[:2], 2, width // 2)
    y[..., width:] = x[..., width:]
    turned, spare = y[..., :width], spare[..., :width]
    np.multiply(x[..., :width], along, out=turned)
    np.multiply(x[..., :width], across, out=spare)
    turned = turned.reshape(halves)
    turned += spare.reshape(halves)[:, :, ::-1]


def _normed(x: Array, weight: Array | None, eps: float) -> tuple[Array, rmsnorm.Saved | None]:
    if weight is None:
        return x, None
    (y, _), saved = rmsnorm.forward(x, weight, eps=eps, zero_centred=True)
    return y, saved


def _unnormed(saved: rmsnorm.Saved | None, dy: Array, wants_weight: bool) -> tuple[Array, Array | None]:
    if saved is None:
        return dy, None
    grads = rmsnorm.backward(saved, dy, wants_weight=wants_weight)
    # one weight serves every head
    return grads.x, grads.weight.sum(axis=0) if grads.weight is not None else None
