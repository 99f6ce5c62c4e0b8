"""One vector for each sequence of a packed batch, on a GPU.

Contract: contracts/ops/pool.yaml. Source: kernels/pool.cu; the reference is lora/ops/pool.py.
"""

from __future__ import annotations

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._instances import CPP_TYPES, contiguous, cpp_type, geometry
from lora.errors import ShapeError, UsageError
from lora.ops.pool import Grads, Kind, Saved

_THREADS = 128


def _kernel(direction: str, cpp: str) -> Kernel:
    return Kernel("pool.cu", f"pool_{direction}<{cpp}>", _THREADS)


KERNELS = tuple(
    _kernel(direction, cpp) for direction in ("forward", "backward") for cpp in CPP_TYPES.values()
)


def forward(x: Array, cu_seqlens: Array, *, kind: Kind) -> tuple[Array, Saved]:
    """Return pooled [S, D] in x's dtype, for `x` [N, D] and its sequences' boundaries `cu_seqlens` [S+1].

    Boundaries that lie on the host are checked there; others are read back from the device.

    Raises:
        UsageError: `kind` is neither "mean" nor "last".
        ShapeError: a sequence is empty and has nothing to pool.
        UnsupportedError: x is neither bfloat16 nor float32.
    """
    if kind not in ("mean", "last"):
        raise UsageError(f'pooling must be "mean" or "last"; got {kind!r}')
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if not bool((lengths > 0).all()):
        raise ShapeError(
            f"every sequence must have a token to pool; sequence {int(lengths.argmin())} has none"
        )
    x = contiguous(x)
    (_, width), sequences = x.shape, len(cu_seqlens) - 1
    pooled = empty((sequences, width), x.dtype, like=x)
    kernel = _kernel("forward", cpp_type("pool", x))
    launch(kernel, _grid(pooled), x, geometry(cu_seqlens, x), pooled, kind == "mean", width)
    return pooled, Saved(cu_seqlens, kind, x.dtype)


def backward(saved: Saved, dpooled: Array) -> Grads:
    """Return the gradient for x, given `dpooled` [S, D]."""
    cu_seqlens, kind, dtype = saved
    dpooled = contiguous(dpooled, dtype)
    dx = empty((int(cu_seqlens[-1]), dpooled.shape[1]), dtype, like=dpooled)
    kernel = _kernel("backward", cpp_type("pool", dx))
    boundaries = geometry(cu_seqlens, dpooled)
    launch(kernel, _grid(dpooled), dpooled, boundaries, dx, kind == "mean", dx.shape[1])
    return Grads(dx)


def _grid(pooled: Array) -> tuple[int, int]:
    """Return the blocks for sequences and columns like those of `pooled` [S, D]."""
    return pooled.shape[0], -(-pooled.shape[1] // _THREADS)
