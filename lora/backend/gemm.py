"""The one door for matrix products: operands are widened here, and nowhere else; on a GPU, cuBLAS runs them.

A frozen weight keeps the dtype that it has on disk and may be memory-mapped. It is widened a block of rows
at a time into a buffer that is used again, so that no weight ever exists twice in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lora.backend.arrays import Array, array_module
from lora.backend.blas import gemm
from lora.backend.dtypes import accumulation_dtype, wide
from lora.backend.memory import empty, scratch
from lora.backend.threads import inside_a_task, run_all, thread_count

WIDENED_BYTES = 32 * 2**20  # of a weight at a time: near the caches, and most weights whole
_SHARED_ROWS = 448  # of a weight: the least that a thread gets to itself, and what it widens at a time
_WIDENED_AT_ONCE = 2**19  # elements that one thread widens: shorter calls wait for Python's lock


def matmul(a: Array, b: Array) -> Array:
    """Return a @ b for [..., M, K] and [..., K, N], computed and returned in the accumulation dtype.

    On a GPU: two matrices, or two stacks of as many, both float32 or both bfloat16.
    """
    if array_module(a, b) is np:
        return wide(a) @ wide(b)
    shape = (*a.shape[:-1], b.shape[-1])
    return matmul_into(empty(shape, accumulation_dtype(a.dtype), like=a), a, b)


def matmul_into(out: Array, a: Array, b: Array, *, scale: float = 1.0, accumulate: bool = False) -> Array:
    """Write scale · a @ b into `out`, added to what it holds where `accumulate`; return `out`.

    Sums are taken in the accumulation dtype, and rounded once to the dtype of `out`. Transposes and cuts of
    rows or columns are read and written where they lie.

    Args:
        out: [M, N], or a stack [B, M, N]; rows are contiguous.
        a: [M, K] or [B, M, K]. On a GPU float32 or bfloat16.
        b: [K, N] or [B, K, N]. On a GPU of a's dtype.
        scale: of the product.
        accumulate: keep what `out` holds, and add.

    Raises:
        ShapeError, DeviceError: on a GPU, where the shapes do not chain or cuBLAS cannot take the arrays.
    """
    if array_module(out, a, b) is not np:
        from lora.backend.cublas import current_cublas  # CUDA's libraries are loaded where there is a device

        current_cublas().matmul_into(out, a, b, scale=scale, accumulate=accumulate)
        return out
    a, b = wide(a), wide(b)
    plain = scale == 1 and not accumulate
    if plain and out.dtype == a.dtype == b.dtype:
        return np.matmul(a, b, out=out)
    if gemm(out, a, b, scale=scale, accumulate=accumulate):
        return out
    product = a @ b
    if scale != 1:
        product *= scale
    if accumulate:
        product += wide(out)
    out[...] = product
    return out


def linear(x: Array, weight: Array) -> Array:
    """Return x weightᵀ, [N, O], for `x` [N, I] and `weight` [O, I], in x's accumulation dtype."""
    x = _operand(x, weight)
    y = empty((x.shape[0], weight.shape[0]), accumulation_dtype(x.dtype), like=x)
    if weight.dtype == x.dtype:
        return matmul_into(y, x, weight.T)

    def write(share: slice) -> None:
        for rows, block in _widened(weight[share], x.dtype):
            matmul_into(y[:, share][:, rows], x, block.T)

    run_all([partial(write, share) for share in _shares(weight, axis=0)])
    return y


def linear_transpose(dy: Array, weight: Array, onto: Array | None = None) -> Array:
    """Return dy weight, [N, I], for `dy` [N, O] and `weight` [O, I], in dy's accumulation dtype.

    With `onto`, an array of that dtype, it is added to what that holds, and `onto` is returned.
    """
    dy, adds = _operand(dy, weight), onto is not None
    shape = (dy.shape[0], weight.shape[1])
    dx = empty(shape, accumulation_dtype(dy.dtype), like=dy) if onto is None else onto
    if weight.dtype == dy.dtype:
        return matmul_into(dx, dy, weight, accumulate=adds)

    def write(share: slice) -> None:
        for rows, block in _widened(weight[:, share], dy.dtype):
            matmul_into(dx[:, share], dy[:, rows], block, accumulate=adds or rows.start > 0)

    run_all([partial(write, share) for share in _shares(weight, axis=1)])
    return dx


def _operand(rows: Array, weight: Array) -> Array:
    """Return `rows` as they enter a product with `weight`: a GPU multiplies bfloat16 without widening it."""
    is_taken = array_module(rows, weight) is not np and rows.dtype == weight.dtype
    return rows if is_taken else wide(rows)


def _shares(weight: Array, axis: int) -> list[slice]:
    """Cut an axis of `weight` into one share a thread; a short one stays whole, and BLAS shares its products.

    A thread that widens what it multiplies reads it out of its own cache, and waits for no other thread.
    """
    length, threads = weight.shape[axis], thread_count()
    if array_module(weight) is not np or length < threads * _SHARED_ROWS:
        return [slice(0, length)]
    bounds = [length * index // threads for index in range(threads + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _widened(weight: Array, dtype: np.dtype[Any]) -> Iterator[tuple[slice, Array]]:
    """Yield blocks of rows of `weight` [O, I] in `dtype`; a block is overwritten by the next one."""
    rows, columns = weight.shape
    fits = WIDENED_BYTES // (columns * dtype.itemsize)
    step = max(1, min(fits // thread_count(), _SHARED_ROWS) if inside_a_task() else fits)
    if array_module(weight) is not np:
        yield from ((slice(i, i + step), weight[i : i + step].astype(dtype)) for i in range(0, rows, step))
        return
    buffer = scratch(min(step, rows) * columns, dtype)
    for start in range(0, rows, step):
        block = weight[start : start + step]
        out = buffer[: block.size].reshape(block.shape)
        _widen_on_all_threads(out, block)
        yield slice(start, start + step), out


def _widen_on_all_threads(out: Array, narrow: Array) -> None:
    step = max(1, _WIDENED_AT_ONCE // narrow.shape[1])
    starts = range(0, len(narrow), step)
    run_all([partial(np.copyto, out[i : i + step], narrow[i : i + step]) for i in starts])
