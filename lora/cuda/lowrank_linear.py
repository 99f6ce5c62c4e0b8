"""Linear layers with low-rank corrections, on a GPU: cuBLAS multiplies by the weights, kernels do the rest.

In bfloat16, y first gets bias + scale · (x Aᵀ) Bᵀ and then x Wᵀ on top, and dx first gets what comes through
the A's: cuBLAS adds to what it finds, so that a correction costs one write of y and no read. What lies
between, x Aᵀ, is kept by ranks in bfloat16: `Saved.lows` are [P, R_p] views of it, P being N rounded up to a
multiple of 8, with zeros below row N. In float32 the reference runs, and cuBLAS makes its products.

Contract: contracts/ops/lowrank_linear.yaml. Source: kernels/lowrank_linear.cu; the reference is
lora/ops/lowrank_linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from lora.backend import (
    Array,
    Kernel,
    array_module,
    bfloat16,
    empty,
    launch,
    matmul,
    matmul_into,
    wide,
)
from lora.cuda._instances import CPP_TYPES, contiguous, cpp_type
from lora.ops import lowrank_linear as reference
from lora.ops.lowrank_linear import Factors, Grads, Part, PartGrads, Saved, check_chain, dealt, stacked

__all__ = ["KERNELS", "Factors", "Grads", "Part", "PartGrads", "Saved", "backward", "forward"]

_FILE = "lowrank_linear.cu"
_THREADS = 256
_TILE = 128  # rows, or columns, of a block
_STEP = 64  # elements that a block sums over at a time
_RANKS = (16, 48, 96)  # of a block: one part, three of rank 16, or anything larger by tiles
_BLOCKS = 256  # at which a sum is split no further: two for each multiprocessor
_LEAST = 128  # elements of a split


def _factor_bytes(ranks: int, by_columns: bool) -> int:
    return 2 * _STEP * ((64 if ranks <= 64 else 128) if by_columns else ranks)


def _project_kernel(ranks: int, by_columns: bool) -> Kernel:
    name = f"lowrank_project<{ranks}, {str(by_columns).lower()}>"
    return Kernel(_FILE, name, _THREADS, 2 * (2 * _TILE * _STEP + _factor_bytes(ranks, by_columns)))


def _gather_kernel(ranks: int) -> Kernel:
    return Kernel(_FILE, f"lowrank_gather<{ranks}>", _THREADS, 2 * 2 * _STEP * (_TILE + ranks))


def _expand_kernel(bias: str, by_columns: bool) -> Kernel:
    return Kernel(_FILE, f"lowrank_expand<{bias}, {str(by_columns).lower()}>", _THREADS, 4 * _STEP * _TILE)


def _sum_kernel(out: str) -> Kernel:
    return Kernel(_FILE, f"lowrank_sum<{out}>", _THREADS)


KERNELS = (
    *(_project_kernel(*each) for each in product(_RANKS, (False, True))),
    *map(_gather_kernel, _RANKS),
    *(_expand_kernel(bias, False) for bias in CPP_TYPES.values()),
    _expand_kernel("float", True),
    *map(_sum_kernel, CPP_TYPES.values()),
)


def forward(x: Array, parts: tuple[Part, ...]) -> tuple[tuple[Array, ...], Saved]:
    """Return the outputs [N, O_p] of every part in x's dtype, for `x` [N, I]; arguments as the reference's.

    Raises:
        ShapeError: the arrays of a part do not chain with x or with each other.
        DeviceError: they do not live in one library.
        UnsupportedError: x is neither bfloat16 nor float32.
    """
    for index, part in enumerate(parts):
        check_chain(x, index, part)
    if cpp_type("lowrank_linear", x) == "float":
        return reference.forward(x, parts)
    x = contiguous(x)
    lows = _lows(x, parts)
    ys = tuple(_output(x, part, low) for part, low in zip(parts, lows, strict=True))
    keeps_x = any(part.factors is not None or part.trained for part in parts)
    return ys, Saved(x if keeps_x else None, lows, parts, x.dtype)


def backward(saved: Saved, dys: tuple[Array, ...], *, wants_x: bool = True) -> Grads:
    """Return the gradients for x and for what is trained, given `dys`, each [N, O_p]."""
    if saved.dtype != bfloat16:
        return reference.backward(saved, dys, wants_x=wants_x)
    dys, parts = tuple(contiguous(dy) for dy in dys), saved.parts
    dlow = _dlow(parts, dys)
    da = None if dlow is None else _gathered(saved.x, dlow, 1.0, by_ranks=True)
    das = (None,) * len(parts) if da is None else dealt(da, parts)
    grads = tuple(
        _part_grads(saved.x, part, low, da, dy)
        for part, low, da, dy in zip(parts, saved.lows, das, dys, strict=True)
    )
    return Grads(_dx(parts, dys, dlow) if wants_x else None, grads)


def _lows(x: Array, parts: tuple[Part, ...]) -> tuple[Array | None, ...]:
    """Return x Aᵀ, [P, R_p] and contiguous by ranks, of every part that has factors."""
    a = _stacked_a(parts)
    if a is None:
        return (None,) * len(parts)
    low = empty((len(a), _padded(len(x))), bfloat16, like=x)
    _project(low, x, a, 1.0, by_columns=False)
    return dealt(low, parts, transposed=True)


def _output(x: Array, part: Part, low: Array | None) -> Array:
    """Return y [N, O] of one part: bias and correction in one write, then the product with the weight."""
    y = empty((len(x), len(part.weight)), x.dtype, like=x)
    corrected = low is not None or part.bias is not None
    if corrected:
        b, scale = (None, 0.0) if part.factors is None else (contiguous(part.factors.b), part.factors.scale)
        _expand(y, None if low is None else low.T, b, contiguous(part.bias), scale, by_columns=False)
    return _add_product(y, x, part.weight.T, accumulate=corrected)


def _dlow(parts: tuple[Part, ...], dys: tuple[Array, ...]) -> Array | None:
    """Return the gradient for x Aᵀ of all parts that have factors, [sum of R_p, P]."""
    ranks = sum(len(part.factors.a) for part in parts if part.factors is not None)
    if not ranks:
        return None
    dlow = empty((ranks, _padded(len(dys[0]))), bfloat16, like=dys[0])
    for part, dy, rows in zip(parts, dys, dealt(dlow, parts), strict=True):
        if part.factors is not None:
            _project(rows, dy, contiguous(part.factors.b), part.factors.scale, by_columns=True)
    return dlow


def _dx(parts: tuple[Part, ...], dys: tuple[Array, ...], dlow: Array | None) -> Array:
    dx = empty((len(dys[0]), parts[0].weight.shape[1]), bfloat16, like=dys[0])
    if dlow is not None:
        _expand(dx, dlow, _stacked_a(parts), None, 1.0, by_columns=True)
    for index, (part, dy) in enumerate(zip(parts, dys, strict=True)):
        _add_product(dx, dy, part.weight, accumulate=index > 0 or dlow is not None)
    return dx


def _part_grads(x: Array | None, part: Part, low: Array | None, da: Array | None, dy: Array) -> PartGrads:
    db = dweight = dbias = None
    if part.factors is not None and low is not None:
        db = _gathered(dy, low.T, part.factors.scale, by_ranks=False)
    if part.trained:
        dweight = matmul(dy.T, x)
        if part.bias is not None:
            dbias = matmul(array_module(dy).ones((1, len(dy)), dy.dtype), dy)[0]
    return PartGrads(da, db, dweight, dbias)


def _project(low: Array, x: Array, factor: Array, scale: float, *, by_columns: bool) -> None:
    """Write scale · factor xᵀ into `low` [R, P], for `x` [N, K] and `factor` [R, K], or [K, R] by columns."""
    (ranks, padded), (rows, inner) = low.shape, x.shape
    tile = _rank_tile(ranks)
    tiles = (-(-ranks // tile), -(-padded // _TILE))
    split, splits = _split(inner, tiles)
    shares = empty((splits, ranks, padded), "float32", like=x)
    kernel = _project_kernel(tile, by_columns)
    launch(kernel, (*tiles, splits), x, factor, shares, split, rows, padded, inner, ranks)
    _sum(low, shares, scale)


def _expand(
    y: Array, low: Array | None, factor: Array | None, bias: Array | None, scale: float, *, by_columns: bool
) -> None:
    """Write bias + scale · lowᵀ factorᵀ into `y` [N, O], for `factor` [O, R], or [R, O] by columns.

    Without `low` [R, P], the bias [O] alone.
    """
    rows, columns = y.shape
    ranks, padded = (0, _padded(rows)) if low is None else low.shape
    kernel = _expand_kernel("float" if bias is None else cpp_type("lowrank_linear", bias), by_columns)
    grid = (-(-columns // _TILE), -(-rows // _TILE))
    launch(kernel, grid, low, factor, bias, y, scale, rows, padded, ranks, columns)


def _gathered(rows: Array, low: Array, scale: float, *, by_ranks: bool) -> Array:
    """Return scale · low rows, [R, C], for `rows` [N, C] and `low` [R, P]; or its transpose, in float32."""
    (count, columns), (ranks, padded) = rows.shape, low.shape
    tile = _rank_tile(ranks)
    tiles = (-(-ranks // tile), -(-columns // _TILE))
    split, splits = _split(count, tiles)
    shape, strides = ((ranks, columns), (1, columns)) if by_ranks else ((columns, ranks), (ranks, 1))
    shares = empty((splits, *shape), "float32", like=rows)
    sizes = (split, count, padded, columns, ranks)
    launch(_gather_kernel(tile), (*tiles, splits), rows, low, shares, *sizes, *strides)
    sums = empty(shape, "float32", like=rows)
    _sum(sums, shares, scale)
    return sums


def _sum(out: Array, shares: Array, scale: float) -> None:
    kernel = _sum_kernel(cpp_type("lowrank_linear", out))
    launch(kernel, (-(-out.size // _THREADS),), shares, out, scale, len(shares), out.size)


def _add_product(out: Array, rows: Array, matrix: Array, *, accumulate: bool) -> Array:
    """Write `rows` @ `matrix` into `out`, or add it; in float32 where they are of two dtypes."""
    if matrix.dtype == rows.dtype:
        return matmul_into(out, rows, matrix, accumulate=accumulate)
    sums = matmul(wide(rows), wide(matrix))
    out[...] = sums + wide(out) if accumulate else sums
    return out


def _stacked_a(parts: Sequence[Part]) -> Array | None:
    arrays = [contiguous(part.factors.a) for part in parts if part.factors is not None]
    return stacked(arrays) if arrays else None


def _rank_tile(ranks: int) -> int:
    return next((tile for tile in _RANKS if ranks <= tile), _RANKS[-1])


def _split(length: int, tiles: tuple[int, int]) -> tuple[int, int]:
    """Return how long the splits of a sum over `length` are, and how many, so that blocks fill the device."""
    wanted = min(-(-_BLOCKS // (tiles[0] * tiles[1])), -(-length // _LEAST))
    split = -(-length // (wanted * _STEP)) * _STEP
    return split, -(-length // split)


def _padded(rows: int) -> int:
    return -(-rows // 8) * 8
