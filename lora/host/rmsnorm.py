"""Root-mean-square normalisation with its residual add, in blocks; lora/ops/rmsnorm.py is its definition."""

from __future__ import annotations

import numpy as np

from lora.backend import Array, accumulation_dtype, array_module, empty, wide
from lora.host.row_blocks import over_rows, row_blocks
from lora.ops.rmsnorm import Grads, Saved, scale_of


def forward(
    x: Array, weight: Array, residual: Array | None = None, *, eps: float, zero_centred: bool = False
) -> tuple[tuple[Array, Array], Saved]:
    """Return ((y, stream), Saved), y and stream [N, D] in x's dtype, for `x` [N, D] and `weight` [D].

    Args:
        x: rows to normalise, or to add to `residual` first.
        weight: per-column scale.
        residual: [N, D] or None; the stream that x is added to.
        eps: added to the mean square, in the unit of x²; from the family contract.
        zero_centred: scale by 1 + weight and round once after it; else round before the scale, as Qwen2.
    """
    array_module(x, weight, residual)
    dtype = accumulation_dtype(x.dtype)
    y, rstd = empty(x.shape, x.dtype), empty((*x.shape[:-1], 1), dtype)
    scale = scale_of(weight, zero_centred, dtype)
    stream = x if residual is None else empty(x.shape, x.dtype)

    def rows(y: Array, rstd: Array, stream: Array) -> None:
        np.vecdot(stream, stream, out=rstd[..., 0])
        rstd /= stream.shape[-1]
        rstd += eps
        np.sqrt(rstd, out=rstd)
        np.reciprocal(rstd, out=rstd)
        np.multiply(stream, rstd, out=y)
        if not zero_centred and x.dtype != dtype:
            y[...] = y.astype(x.dtype)
        y *= scale

    if residual is None:
        over_rows(rows, (y, rstd), (x,))
        return (y, x), Saved(x, weight, rstd, zero_centred)

    def rows_of_sum(y: Array, stream: Array, rstd: Array, x_rows: Array, residual_rows: Array) -> None:
        np.add(x_rows, residual_rows, out=stream)
        if x.dtype != dtype:
            stream[...] = stream.astype(x.dtype)
        rows(y, rstd, stream)

    over_rows(rows_of_sum, (y, stream, rstd), (x, residual))
    return (y, stream), Saved(stream, weight, rstd, zero_centred)


def backward(saved: Saved, dy: Array, dstream: Array | None = None, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, D] for y and `dstream` [N, D] for the stream as it flows on."""
    stream, weight, rstd, zero_centred = saved
    array_module(stream, dy, dstream)
    scale = scale_of(weight, zero_centred, rstd.dtype)
    dx = empty(stream.shape, stream.dtype)

    def rows(dx: Array, stream: Array, rstd: Array, dy: Array, *rest: Array) -> None:
        *dstream, along = rest
        np.multiply(dy, scale, out=dx)
        # the projection removes the part of dx that would only rescale the row
        share = np.vecdot(dx, stream)[..., None] / dx.shape[-1]
        for _ in range(3):  # one factor after the other: the cube of rstd alone leaves the range of float32
            share *= rstd
        dx *= rstd
        dx -= np.multiply(stream, share, out=along)
        for flowing_on in dstream:
            dx += flowing_on

    over_rows(rows, (dx,), (stream, rstd, dy, *(() if dstream is None else (dstream,))), temporaries=1)
    return Grads(dx, _weight_gradient(saved, dy) if wants_weight else None)


def _weight_gradient(saved: Saved, dy: Array) -> Array:
    """Return Σ_n dy_n · normed_n in the accumulation dtype, over blocks of rows in their order."""
    stream, _, rstd, _ = saved
    shares = [(wide(dy[b]) * wide(stream[b]) * rstd[b]).sum(axis=0) for b in row_blocks(dy)]
    return np.sum(shares, axis=0)
