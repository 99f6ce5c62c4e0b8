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
    return (_rotated(q, cos, sin), _rotated(k, cos, sin)), Saved(cos, sin, q_normed, k_normed)


def backward(saved: Saved, dq: Array, dk: Array, *, wants_norms: bool = False) -> Grads:
    """Return the gradients, given `dq` [N, H, E] and `dk` [N, G, E] for the rotated arrays."""
    dq, dq_norm = _unnormed(saved.q_normed, _rotated(dq, saved.cos, -saved.sin), wants_norms)
    dk, dk_norm = _unnormed(saved.k_normed, _rotated(dk, saved.cos, -saved.sin), wants_norms)
    return Grads(dq, dk, dq_norm, dk_norm)


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs of `x` [N, heads, E] by the angles [N, r/2]; a rotation by -sin undoes one by sin."""
    half, y = cos.shape[1], empty(x.shape, x.dtype)

    def rows(y: Array, x: Array, cos: Array, sin: Array, spare: Array) -> None:
        cos, sin, spare = cos[:, None], sin[:, None], spare[..., :half]
        first, second = x[..., :half], x[..., half : 2 * half]
        y[..., 2 * half :] = x[..., 2 * half :]
        np.multiply(first, cos, out=y[..., :half])
        y[..., :half] -= np.multiply(second, sin, out=spare)
        np.multiply(second, cos, out=y[..., half : 2 * half])
        y[..., half : 2 * half] += np.multiply(first, sin, out=spare)

    over_rows(rows, (y,), (x, cos, sin), temporaries=1)
    return y


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
