"""One vector for each sequence of a packed batch, for a classification head to read.

    mean: pooled_s = mean of x over the tokens of s            last: pooled_s = x at the last token of s

Contract: contracts/ops/pool.yaml.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from lora.backend import Array, array_module, wide
from lora.errors import ShapeError, UsageError

Kind = Literal["mean", "last"]


class Saved(NamedTuple):
    """Pooling is linear: no activation is kept."""

    cu_seqlens: Array  # [S+1]
    kind: Kind
    dtype: Any  # of x


class Grads(NamedTuple):
    """The only input."""

    x: Array  # [N, D] dtype of x


def forward(x: Array, cu_seqlens: Array, *, kind: Kind) -> tuple[Array, Saved]:
    """Return pooled [S, D] in x's dtype, for `x` [N, D] and its sequences' boundaries `cu_seqlens` [S+1].

    Raises:
        UsageError: `kind` is neither "mean" nor "last".
        ShapeError: a sequence is empty and has nothing to pool.
    """
    xp = array_module(x, cu_seqlens)
    if kind not in ("mean", "last"):
        raise UsageError(f'pooling must be "mean" or "last"; got {kind!r}')
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if not bool((lengths > 0).all()):
        raise ShapeError(
            f"every sequence must have a token to pool; sequence {int(lengths.argmin())} has none"
        )
    saved = Saved(cu_seqlens, kind, x.dtype)
    if kind == "last":
        return x[cu_seqlens[1:] - 1], saved
    sums = xp.add.reduceat(wide(x), cu_seqlens[:-1], axis=0)
    return (sums / lengths[:, None].astype(sums.dtype)).astype(x.dtype, copy=False), saved


def backward(saved: Saved, dpooled: Array) -> Grads:
    """Return the gradient for x, given `dpooled` [S, D]."""
    xp = array_module(saved.cu_seqlens, dpooled)
    if saved.kind == "last":
        dx = xp.zeros((int(saved.cu_seqlens[-1]), dpooled.shape[1]), saved.dtype)
        dx[saved.cu_seqlens[1:] - 1] = dpooled
        return Grads(dx)
    lengths = saved.cu_seqlens[1:] - saved.cu_seqlens[:-1]
    shares = wide(dpooled) / lengths[:, None].astype(wide(dpooled).dtype)
    return Grads(xp.repeat(shares.astype(saved.dtype, copy=False), lengths, axis=0))
