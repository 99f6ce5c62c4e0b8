"""Root-mean-square normalisation with the residual add that precedes it, on a GPU; a block for each row.

Contract: contracts/ops/rmsnorm.yaml. Source: kernels/rmsnorm.cu; the reference is lora/ops/rmsnorm.py.
"""

from __future__ import annotations

from itertools import product

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._instances import CPP_TYPES, PACK_BYTES, contiguous, cpp_type
from lora.errors import UnsupportedError
from lora.ops.rmsnorm import Grads, Saved

_FILE = "rmsnorm.cu"
_SHAPES = ((128, 4), (1024, 2))  # threads of a block and packs of a thread: 4,096 and 16,384 of bfloat16
_CHUNK = 32  # rows that one block adds to the gradient of the weight
_SUM = Kernel(_FILE, "sum_shares", 128)


def _kernel(direction: str, x: str, weight: str, shape: tuple[int, int]) -> Kernel:
    return Kernel(_FILE, f"rmsnorm_{direction}<{x}, {weight}, {shape[0]}, {shape[1]}>", shape[0])


def _shares(x: str) -> Kernel:
    return Kernel(_FILE, f"rmsnorm_weight_shares<{x}>", 128)


KERNELS = (
    *(
        _kernel(*each)
        for each in product(("forward", "backward"), CPP_TYPES.values(), CPP_TYPES.values(), _SHAPES)
    ),
    *map(_shares, CPP_TYPES.values()),
    _SUM,
)


def forward(
    x: Array, weight: Array, residual: Array | None = None, *, eps: float, zero_centred: bool = False
) -> tuple[tuple[Array, Array], Saved]:
    """Return ((y, stream), Saved), y and stream [N, D] in x's dtype, for `x` [N, D] and `weight` [D].

    Args:
        x: rows to normalise, or to add to `residual` first.
        weight: per-column scale, bfloat16 or float32 whatever x is.
        residual: [N, D] or None; the stream that x is added to.
        eps: added to the mean square, in the unit of x²; from the family contract.
        zero_centred: scale by 1 + weight and round once after it; else round before the scale, as Qwen2.

    Raises:
        UnsupportedError: there is no kernel for the dtypes, or for rows of this width.
    """
    x, weight, residual = contiguous(x), contiguous(weight), contiguous(residual)
    (rows, width), y = x.shape, empty(x.shape, x.dtype, like=x)
    rstd = empty((rows, 1), "float32", like=x)
    stream = None if residual is None else empty(x.shape, x.dtype, like=x)
    kernel = _instance("forward", x, weight)
    launch(kernel, (rows,), x, residual, weight, y, stream, rstd, eps, zero_centred, width)
    stream = x if stream is None else stream
    return (y, stream), Saved(stream, weight, rstd, zero_centred)


def backward(saved: Saved, dy: Array, dstream: Array | None = None, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, D] for y and `dstream` [N, D] for the stream as it flows on."""
    stream, weight, rstd, zero_centred = saved
    dy, dstream = contiguous(dy), contiguous(dstream)
    rows, width = stream.shape
    dx = empty(stream.shape, stream.dtype, like=stream)
    kernel = _instance("backward", stream, weight)
    launch(kernel, (rows,), stream, weight, rstd, dy, dstream, dx, zero_centred, width)
    return Grads(dx, weight_gradient(saved, dy) if wants_weight else None)


def weight_gradient(saved: Saved, dy: Array) -> Array:
    """Return the gradient for the weight [D] in float32, added in the same order in every run."""
    stream, rstd = saved.stream, saved.rstd
    rows, width = stream.shape
    chunks, columns = -(-rows // _CHUNK), -(-width // _SUM.threads)
    shares = empty((chunks, width), "float32", like=stream)
    dweight = empty((width,), "float32", like=stream)
    kernel = _shares(cpp_type("rmsnorm", stream))
    launch(kernel, (columns, chunks), stream, rstd, dy, shares, _CHUNK, rows, width)
    launch(_SUM, (columns,), shares, dweight, chunks, width)
    return dweight


def _instance(direction: str, x: Array, weight: Array) -> Kernel:
    """Return the instance for rows like `x`, or say why there is none."""
    lanes = PACK_BYTES // x.dtype.itemsize
    for shape in _SHAPES:
        if x.shape[1] <= shape[0] * shape[1] * lanes:
            return _kernel(direction, cpp_type("rmsnorm", x), cpp_type("rmsnorm", weight), shape)
    widest = _SHAPES[-1][0] * _SHAPES[-1][1] * lanes
    raise UnsupportedError(f"rmsnorm on a GPU: expected rows of at most {widest} elements; got {x.shape[1]}")
