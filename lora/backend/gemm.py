"""The one door for matrix products: operands are widened here, and nowhere else.

A frozen weight keeps the dtype that it has on disk and may be memory-mapped. It is widened a block of rows
at a time into a buffer that is used again, so that no weight ever exists twice in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from lora.backend.arrays import Array
from lora.backend.dtypes import accumulation_dtype, bfloat16, wide
from lora.backend.memory import empty

WIDENED_BYTES = (
    64 * 2**20
)  # one block of a widened weight: it stays near the caches and bounds the extra memory

_scratch = threading.local()


def matmul(a: Array, b: Array) -> Array:
    """Return a @ b for [..., M, K] and [..., K, N], computed and returned in the accumulation dtype."""
    return wide(a) @ wide(b)


def linear(x: Array, weight: Array) -> Array:
    """Return x weightᵀ, [N, O], for `x` [N, I] and `weight` [O, I], in x's accumulation dtype."""
    x = wide(x)
    if weight.dtype == x.dtype:
        return x @ weight.T
    y = empty((x.shape[0], weight.shape[0]), x.dtype)
    for rows, block in _widened(weight, x.dtype):
        np.matmul(x, block.T, out=y[:, rows])
    return y


def linear_transpose(dy: Array, weight: Array) -> Array:
    """Return dy weight, [N, I], for `dy` [N, O] and `weight` [O, I], in dy's accumulation dtype."""
    dy = wide(dy)
    if weight.dtype == dy.dtype:
        return dy @ weight
    dx: Array = None
    for rows, block in _widened(weight, dy.dtype):
        share = dy[:, rows] @ block
        dx = share if dx is None else np.add(dx, share, out=dx)
    return dx


def _widened(weight: Array, dtype: np.dtype[Any]) -> Iterator[tuple[slice, Array]]:
    """Yield blocks of rows of `weight` [O, I] in `dtype`; a block is overwritten by the next one."""
    rows, columns = weight.shape
    step = max(1, WIDENED_BYTES // (columns * dtype.itemsize))
    buffer = _buffer(min(step, rows) * columns, dtype)
    for start in range(0, rows, step):
        block = weight[start : start + step]
        out = buffer[: block.size].reshape(block.shape)
        widen_into(out, block)
        yield slice(start, start + step), out


def widen_into(out: Array, narrow: Array) -> None:
    """Write `narrow` into `out`, a wider dtype of the same shape; exact for every stored dtype."""
    if narrow.dtype == bfloat16 and out.dtype == np.float32:
        # a bfloat16 is the upper half of a float32: a copy and a shift, several times faster than a cast
        bits = out.view(np.uint32)
        np.copyto(bits, narrow.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, narrow.astype(accumulation_dtype(narrow.dtype), copy=False))


def _buffer(size: int, dtype: np.dtype[Any]) -> Array:
    """Return this thread's scratch of at least `size` elements of `dtype`."""
    held: dict[Any, Array] = _scratch.__dict__
    if dtype not in held or held[dtype].size < size:
        held[dtype] = np.empty(size, dtype)
    return held[dtype]
