"""Root-mean-square normalisation over the last axis, with the residual add that precedes it.

    stream = x + residual        rstd = 1 / sqrt(mean(stream²) + eps)        y = stream · rstd · w

where w is the weight, or 1 + weight in the zero-centred form of Qwen3.5.

Contract: contracts/ops/rmsnorm.yaml. Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lora.backend import Array, array_module, wide


class Saved(NamedTuple):
    """What backward needs, and no more: its size is the operation's activation memory."""

    stream: Array  # [N, D] x's dtype
    weight: Array  # [D]    stored dtype
    rstd: Array  # [N, 1]   accumulation dtype
    zero_centred: bool


class Grads(NamedTuple):
    """`x` is the gradient for the stream, and so for x and for the residual alike."""

    x: Array  # [N, D] dtype of the stream
    weight: Array | None  # [D] accumulation dtype; None where the weight is frozen


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
    xp = array_module(x, weight, residual)
    stream = x if residual is None else x + residual
    rows = wide(stream)
    rstd = 1 / xp.sqrt(xp.mean(rows * rows, axis=-1, keepdims=True) + eps)
    normed, scale = rows * rstd, scale_of(weight, zero_centred, rows.dtype)
    if not zero_centred:
        normed = wide(normed.astype(x.dtype, copy=False))
    y = normed * scale
    return (y.astype(x.dtype, copy=False), stream), Saved(stream, weight, rstd, zero_centred)


def backward(saved: Saved, dy: Array, dstream: Array | None = None, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, D] for y and `dstream` [N, D] for the stream as it flows on."""
    xp = array_module(saved.stream, dy, dstream)
    normed = wide(saved.stream) * saved.rstd
    dnormed = wide(dy) * scale_of(saved.weight, saved.zero_centred, normed.dtype)
    # the projection removes the part of dnormed that would only rescale the row
    along = xp.mean(dnormed * normed, axis=-1, keepdims=True)
    dx = saved.rstd * (dnormed - normed * along)
    if dstream is not None:
        dx += wide(dstream)
    dweight = (wide(dy) * normed).sum(axis=0) if wants_weight else None
    return Grads(dx.astype(saved.stream.dtype, copy=False), dweight)


def scale_of(weight: Array, zero_centred: bool, dtype: Any) -> Array:
    """Return what a normed row is multiplied by, [D]; widened first: 1 + weight is rounded in `dtype`."""
    return 1 + weight.astype(dtype) if zero_centred else weight.astype(dtype, copy=False)
