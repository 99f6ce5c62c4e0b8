"""Rotary position embedding after the per-head norms of Qwen3.5, on a GPU.

The norms are those of lora.cuda.rmsnorm over rows of one head each.

Contract: contracts/ops/rope.yaml. Source: kernels/rope.cu; the reference is lora/ops/rope.py.
"""

from __future__ import annotations

from lora.backend import Array, Kernel, empty, launch
from lora.cuda import rmsnorm
from lora.cuda._instances import CPP_TYPES, PACK_BYTES, contiguous, cpp_type
from lora.errors import ShapeError
from lora.ops.rope import Grads, Saved, angles

__all__ = ["KERNELS", "Grads", "Saved", "angles", "backward", "forward"]

_THREADS = 256


def _kernel(cpp: str) -> Kernel:
    return Kernel("rope.cu", f"rope_rotate<{cpp}>", _THREADS)


KERNELS = tuple(map(_kernel, CPP_TYPES.values()))


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
        q: [N, H, E] queries, bfloat16 or float32.
        k: [N, G, E] keys.
        cos: [N, r/2] float32 from `angles`, r <= E.
        sin: [N, r/2] likewise.
        q_norm: [E] zero-centred weight of the norm of each query head, or None.
        k_norm: [E] likewise for key heads.
        eps: of those norms, in the unit of their input squared.

    Raises:
        ShapeError: a head is narrower than the part that is to be rotated.
        UnsupportedError: there is no kernel for the dtypes.
    """
    if 2 * cos.shape[1] > q.shape[2]:
        raise ShapeError(f"heads of {q.shape[2]} dimensions cannot have {2 * cos.shape[1]} of them rotated")
    cos, sin = contiguous(cos), contiguous(sin)
    q, q_normed = _normed(contiguous(q), q_norm, eps)
    k, k_normed = _normed(contiguous(k), k_norm, eps)
    rotated = _rotated(q, cos, sin, 1), _rotated(k, cos, sin, 1)
    return rotated, Saved(cos, sin, q_normed, k_normed)


def backward(saved: Saved, dq: Array, dk: Array, *, wants_norms: bool = False) -> Grads:
    """Return the gradients, given `dq` [N, H, E] and `dk` [N, G, E] for the rotated arrays."""
    dq, dk = (_rotated(contiguous(d), saved.cos, saved.sin, -1) for d in (dq, dk))
    dq, dq_norm = _unnormed(saved.q_normed, dq, wants_norms)
    dk, dk_norm = _unnormed(saved.k_normed, dk, wants_norms)
    return Grads(dq, dk, dq_norm, dk_norm)


def _rotated(x: Array, cos: Array, sin: Array, sign: int) -> Array:
    (tokens, heads, width), half = x.shape, cos.shape[1]
    y = empty(x.shape, x.dtype, like=x)
    lanes = PACK_BYTES // x.dtype.itemsize
    units = -(-half // lanes) + -(-(width - 2 * half) // lanes)
    blocks = -(-tokens * heads * units // _THREADS)
    launch(_kernel(cpp_type("rope", x)), (blocks,), x, cos, sin, y, sign, tokens, heads, width, half)
    return y


def _normed(x: Array, weight: Array | None, eps: float) -> tuple[Array, rmsnorm.Saved | None]:
    if weight is None:
        return x, None
    rows = x.reshape(-1, x.shape[2])
    (y, _), saved = rmsnorm.forward(rows, weight, eps=eps, zero_centred=True)
    return y.reshape(x.shape), saved


def _unnormed(saved: rmsnorm.Saved | None, dy: Array, wants_weight: bool) -> tuple[Array, Array | None]:
    if saved is None:
        return dy, None
    grads = rmsnorm.backward(saved, dy.reshape(saved.stream.shape), wants_weight=wants_weight)
    return grads.x.reshape(dy.shape), grads.weight
