"""Rotary position embedding over the first dimensions of each head, after the per-head norms of Qwen3.5.

    x'        = x · (1 + w) / sqrt(mean(x²) + eps)               only where norms are given
    y_j       = x'_j cos(m ω_j) - x'_{j+r/2} sin(m ω_j)          ω_j = theta^(-2j / r),  0 <= j < r/2
    y_{j+r/2} = x'_{j+r/2} cos(m ω_j) + x'_j sin(m ω_j)          at position m; r = rotary_dim

The dimensions from r on pass through. Pairs are half-split, (j, j + r/2), as Qwen's checkpoints store them,
not interleaved (2j, 2j + 1).

Contract: contracts/ops/rope.yaml. Source: Su et al. 2021, arXiv:2104.09864, eq. 15 and 34.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, array_module, empty, wide
from lora.errors import ShapeError
from lora.ops import rmsnorm


class Saved(NamedTuple):
    """A rotation is undone from its angles alone; only the norms keep what they read."""

    cos: Array  # [N, r/2]
    sin: Array  # [N, r/2]
    q_normed: rmsnorm.Saved | None
    k_normed: rmsnorm.Saved | None


class Grads(NamedTuple):
    """The norm weights are frozen unless asked for."""

    q: Array  # [N, H, E] dtype of q
    k: Array  # [N, G, E] dtype of k
    q_norm: Array | None  # [E] accumulation dtype
    k_norm: Array | None  # [E] accumulation dtype


def angles(positions: Array, *, theta: float, rotary_dim: int, dtype: Any) -> tuple[Array, Array]:
    """Return cos and sin [N, rotary_dim/2] in `dtype` of the angles at `positions` [N].

    The angle is taken in float64: at position 100,000 a float32 angle is already wrong in the third decimal.

    Raises:
        ShapeError: rotary_dim is odd, so that its dimensions form no pairs.
    """
    xp = array_module(positions)
    if rotary_dim % 2:
        raise ShapeError(f"rotary_dim must be even, its dimensions are rotated in pairs; got {rotary_dim}")
    frequencies = theta ** (-xp.arange(0, rotary_dim, 2, dtype="float64") / rotary_dim)
    angle = positions.astype("float64")[:, None] * frequencies
    return xp.cos(angle).astype(dtype), xp.sin(angle).astype(dtype)


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


def check_width(q: Array, k: Array, cos: Array, sin: Array, *norms: Array | None) -> None:
    """Check that the heads are as wide as what is rotated of them, and that all arrays are of one library."""
    array_module(q, k, cos, sin, *norms)
    if 2 * cos.shape[1] > q.shape[2]:
        raise ShapeError(f"heads of {q.shape[2]} dimensions cannot have {2 * cos.shape[1]} of them rotated")


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs of `x` [N, heads, E] by the angles [N, r/2]; a rotation by -sin undoes one by sin."""
    half = cos.shape[1]
    cos, sin = wide(cos)[:, None], wide(sin)[:, None]
    first, second = wide(x[..., :half]), wide(x[..., half : 2 * half])
    y = empty(x.shape, x.dtype, like=x)
    y[..., :half] = first * cos - second * sin
    y[..., half : 2 * half] = second * cos + first * sin
    y[..., 2 * half :] = x[..., 2 * half :]
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
