"""The short causal convolution and its silu, in blocks of rows; lora/ops/causal_conv1d.py is its definition.

    y = h (1 + t)        dy/dh = (1 + t) (1 + h (1 - t))        with h = m / 2, t = tanh(h)

is silu of m in fewer passes: the taps are halved before, which is exact, and 1 + t is off by a rounding of 1,
so that y is off by one of m, as m itself is.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise, zip_longest
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lora.backend import Array, accumulation_dtype, empty, run_all, scratch, wide
from lora.host import row_blocks
from lora.ops.causal_conv1d import Grads, check_shapes

BLOCKS = 2  # of row_blocks.BLOCK_ELEMENTS in one here: calls are longer, and few arrays share the cache


class Saved(NamedTuple):
    """The inputs: what silu was applied to is J multiplications away, and is not kept."""

    x: Array  # [N, D]
    weight: Array  # [D, 1, J]
    cu_seqlens: Array  # [S+1]
    window: Array | None  # [S, J-1, D]


class _Block(NamedTuple):
    """Rows of one sequence, which runs from `start` to `stop`."""

    sequence: int
    rows: slice
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def forward(
    x: Array, weight: Array, cu_seqlens: Array, window: Array | None = None
) -> tuple[tuple[Array, Array], Saved]:
    """Return ((y, window), Saved): y [N, D] in x's dtype, and the last J-1 rows [S, J-1, D] of each sequence.

    Arguments and errors as the reference's: `x` [N, D], `weight` [D, 1, J], `window` [S, J-1, D] or None.
    """
    check_shapes(x, weight, cu_seqlens, window)
    saved, taps, y = Saved(x, weight, cu_seqlens, window), _taps(x, weight), empty(x.shape, x.dtype)

    def run(block: _Block) -> None:
        seen, half, gate = _scratch(saved, block, 3)
        half = _mix(half, taps, _look_back(seen, saved, block))
        gate = np.tanh(half, out=gate[: block.size])
        gate += 1
        np.multiply(half, gate, out=y[block.rows], casting="unsafe")

    run_all([partial(run, block) for block in _blocks(saved)])
    return (y, _last_rows(saved)), saved


def backward(saved: Saved, dy: Array, *, wants_weight: bool = False) -> Grads:
    """Return the gradients, given `dy` [N, D]."""
    taps, blocks, dx = _taps(saved.x, saved.weight), _blocks(saved), empty(saved.x.shape, saved.x.dtype)
    shares = np.zeros((len(blocks) if wants_weight else 0, *taps.shape), taps.dtype)

    def run(block: _Block, share: Array | None) -> None:
        # what later rows of the sequence send back to the block's last ones is computed here once more
        before = len(taps) - 1
        reach = _reaching(block, before)
        seen, half, gate, spare = _scratch(saved, reach, 4)
        dhalf = _mix(half, taps, _look_back(seen, saved, reach))
        open_ = np.tanh(dhalf, out=gate[: reach.size])
        dhalf *= np.subtract(1, open_, out=spare[: reach.size])
        dhalf += 1
        open_ += 1
        dhalf *= open_
        dhalf *= wide(dy[reach.rows])
        if share is not None:
            _share_of_taps(share, dhalf[: block.size], seen)
        half[reach.size :] = 0  # nothing flows back from behind the sequence
        dx[block.rows] = _mix(gate, taps[::-1], half[: block.size + before])

    run_all([partial(run, block, share) for block, share in zip_longest(blocks, shares)])
    dweight = shares.sum(axis=0).T[:, None] / 2 if wants_weight else None
    return Grads(dx, dweight)


def _taps(x: Array, weight: Array) -> Array:
    """Return halves of [D, 1, J] as [J, D] in the dtype that rows of `x` are summed in."""
    return np.ascontiguousarray(weight[:, 0].T, accumulation_dtype(x.dtype)) / 2


def _blocks(saved: Saved) -> list[_Block]:
    """Cut every sequence into blocks of rows, as equal as can be."""
    blocks, most = [], max(1, BLOCKS * row_blocks.BLOCK_ELEMENTS // max(1, saved.x.shape[1]))
    for sequence, (start, stop) in enumerate(pairwise(saved.cu_seqlens.tolist())):
        count = -(-(stop - start) // most)
        bounds = [start + (stop - start) * i // count for i in range(count)] + [stop]
        blocks += [_Block(sequence, slice(*rows), start, stop) for rows in pairwise(bounds)]
    return blocks


def _reaching(block: _Block, after: int) -> _Block:
    """Return `block` with up to `after` more rows of its sequence behind it."""
    return block._replace(rows=slice(block.rows.start, min(block.rows.stop + after, block.stop)))


def _scratch(saved: Saved, block: _Block, count: int) -> Array:
    """Return `count` arrays [J-1 + rows of `block`, D] of this thread's own, in the accumulation dtype."""
    shape = (count, saved.weight.shape[-1] - 1 + block.size, saved.x.shape[1])
    return scratch(prod(shape), accumulation_dtype(saved.x.dtype)).reshape(shape)


def _look_back(seen: Array, saved: Saved, block: _Block) -> Array:
    """Fill `seen` [J-1 + rows of `block`, D] with those rows and what lies before them; return it."""
    rows, before = block.rows, saved.weight.shape[-1] - 1
    outside = max(0, before - (rows.start - block.start))  # rows that lie before the sequence
    if outside:
        seen[:outside] = 0 if saved.window is None else saved.window[block.sequence, before - outside :]
    seen[outside:] = saved.x[rows.start - before + outside : rows.stop]
    return seen


def _mix(out: Array, taps: Array, rows: Array) -> Array:
    """Return Σ_j taps_j rows_{n+j}, in the first rows of `out`; in one pass, a row at a time."""
    windows = sliding_window_view(rows, len(taps), axis=0)
    return np.einsum("ndj,jd->nd", windows, taps, out=out[: len(windows)])


def _share_of_taps(share: Array, dhalf: Array, seen: Array) -> None:
    """Write what rows give to the gradient of the taps [J, D]."""
    windows = sliding_window_view(seen, len(share), axis=0)[: len(dhalf)]
    np.einsum("nd,ndj->jd", dhalf, windows, out=share)


def _last_rows(saved: Saved) -> Array:
    """Return the last J-1 rows of each sequence [S, J-1, D], out of its window where it is shorter."""
    x, before = saved.x, saved.weight.shape[-1] - 1
    last = np.zeros((saved.cu_seqlens.size - 1, before, x.shape[1]), x.dtype)
    for sequence, (start, stop) in enumerate(pairwise(saved.cu_seqlens.tolist())):
        own = min(before, stop - start)
        if saved.window is not None:
            last[sequence, : before - own] = saved.window[sequence, own:]
        last[sequence, before - own :] = x[stop - own : stop]
    return last
