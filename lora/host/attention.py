"""Causal attention in tiles, sequences shared out over threads; lora/ops/attention.py is its definition.

A tile is a range of query rows, in all heads that share a key-value head, against the keys up to its last:
of what is hidden, only a part on the diagonal is computed. Its scores lie by keys, a column to each query of
each head. The softmax then runs down the columns, and every pass goes through memory in order.

Threads take turns at Python's lock, and one that waits for it sleeps: calls are few and long, and for all
groups of heads at once where there are enough sequences to share out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache, partial
from math import ceil, prod
from typing import Any, NamedTuple

import numpy as np

from lora.backend import Array, accumulation_dtype, empty, run_all, wide
from lora.backend.threads import thread_count
from lora.host.scratch_arrays import scratch_arrays
from lora.ops.attention import Grads, Saved, check_shapes, runs

ROWS = 64  # of queries in a tile, or nearly: fewer mean more calls, more compute more of what is hidden
LEAST_ROWS = 16  # in a long sequence
TILE_SCORES = 2**20  # that a tile is made smaller for: 4 MB in float32
MOST_ROWS = 96  # what remains of a sequence joins a tile if it is less than half of one
_APART = 16  # elements from one row of a wider matrix to where the next may start


class _Task(NamedTuple):
    """What one thread computes at a time: no other task reads what it writes."""

    rows: slice
    groups: slice  # heads of k and v
    heads: slice  # of q, that share them
    starts: tuple[int, ...]  # rows of the task at which a sequence begins, but for the first

    def queries(self, x: Array) -> Array:
        """Return this task's part of `x` [N, H, ...] as a view [groups, rows, M, ...]."""
        own = x[self.rows, self.heads]
        return own.reshape(len(own), self.groups.stop - self.groups.start, -1, *own.shape[2:]).swapaxes(0, 1)

    def keys(self, x: Array) -> Array:
        """Return this task's part of `x` [N, G, E] as a view [groups, rows, E]."""
        return x[self.rows, self.groups].swapaxes(0, 1)


class _Tile(NamedTuple):
    columns: slice  # of all queries of the task: row by row, and head by head in a row
    first: int  # row of the task
    seen: int  # keys: as many as there are rows up to the tile's last


def forward(q: Array, k: Array, v: Array, cu_seqlens: Array, *, scale: float) -> tuple[Array, Saved]:
    """Return o [N, H, E] in q's dtype, for queries `q` [N, H, E] and `k`, `v` [N, G, E].

    Args:
        q: queries, rotated.
        k: keys, rotated.
        v: values.
        cu_seqlens: [S+1] integer boundaries of the sequences, from 0 to N.
        scale: multiplies every score; E^-0.5.

    Raises:
        ShapeError: the arrays do not fit, G does not divide H, or the boundaries do not run from 0 to N.
    """
    check_shapes(q, k, v, cu_seqlens)
    o = empty(q.shape, q.dtype)
    lse = empty(q.shape[:2], accumulation_dtype(q.dtype))
    saved = Saved(q, k, v, o, lse, cu_seqlens, scale)
    run_all([partial(_forward, task, saved) for task in _tasks(saved)])
    return o, saved


def backward(saved: Saved, do: Array) -> Grads:
    """Return the gradients for q, k and v, given `do` [N, H, E]."""
    grads = Grads(*(empty(array.shape, array.dtype) for array in (saved.q, saved.k, saved.v)))
    run_all([partial(_backward, task, saved, do, grads) for task in _tasks(saved)])
    return grads


def _forward(task: _Task, saved: Saved) -> None:
    """Write this task's part of o and lse."""
    q, o, lse = (task.queries(x) for x in (saved.q, saved.o, saved.lse))
    groups, rows, shared, width = q.shape
    columns, tiles = rows * shared, _tiles(groups, rows, shared)
    keys, queries, scores, top, total, ones = scratch_arrays(
        lse.dtype,
        (groups, rows, width),
        (groups, columns, width),
        (groups, rows, tiles[0].columns.stop),
        (groups, columns),
        (groups, columns),
        (rows,),
    )
    keys[...] = task.keys(saved.k)
    keys *= saved.scale
    values = wide(task.keys(saved.v))
    queries.reshape(q.shape)[...] = q
    ones[...] = 1
    for tile in tiles:
        own, highest = queries[:, tile.columns], top[:, tile.columns]
        weights = scores[:, : tile.seen, : own.shape[1]]
        np.matmul(keys[:, : tile.seen], own.swapaxes(1, 2), out=weights)
        _hide(weights, tile, task)
        np.max(weights, axis=1, out=highest)
        weights -= highest[:, None]
        np.exp(weights, out=weights)
        np.matmul(ones[: tile.seen], weights, out=total[:, tile.columns])
        # the tile's queries are read for the last time above: o takes their place
        np.matmul(weights.swapaxes(1, 2), values[:, : tile.seen], out=own)
    np.log(total.reshape(lse.shape), out=lse)
    lse += top.reshape(lse.shape)
    np.reciprocal(total, out=total)
    np.multiply(queries.reshape(q.shape), total.reshape(*lse.shape, 1), out=o, casting="same_kind")


def _backward(task: _Task, saved: Saved, do: Array, grads: Grads) -> None:
    """Write this task's part of the gradients.

    The scores come from the product that made them in forward, to the same bits: with others the weights of
    a row would not quite sum to 1, and what all its keys have in common would leak into dq. One column more
    in the other product takes o·do, which is Σ_m p_nm dp_nm, off dp.
    """
    q, o, do, dq, lse = (task.queries(x) for x in (saved.q, saved.o, do, grads.q, saved.lse))
    groups, rows, shared, width = q.shape
    keys, values, queries, dos, total, p, dp, *by_key = scratch_arrays(
        lse.dtype, *_backward_shapes(groups, rows, shared, width)
    )
    keys[...] = task.keys(saved.k)
    keys *= saved.scale
    values[..., :width], values[..., width] = task.keys(saved.v), -1
    queries[...], dos[..., :width], total[...] = q, do, lse
    np.vecdot(dos[..., :width], wide(o), out=dos[..., width])
    queries, dos = (x.reshape(groups, rows * shared, -1) for x in (queries, dos))
    operands = _Operands(
        keys, values[..., : width + 1], queries, dos[..., : width + 1], total.reshape(groups, -1)
    )
    # the last tile meets every key: it writes what the others add to
    for tile in reversed(_tiles(groups, rows, shared)):
        _tile_backward(operands, (p, dp), by_key, tile, task)
    # each tile has left dq where its queries were
    dq[...] = queries.reshape(dq.shape)
    dk, dv, _ = by_key
    dk *= saved.scale
    task.keys(grads.k)[...], task.keys(grads.v)[...] = dk, dv


class _Operands(NamedTuple):
    """What tiles are cut from."""

    keys: Array  # [groups, rows, E] times the scale
    values: Array  # [groups, rows, E + 1] with -1 behind each
    queries: Array  # [groups, rows · M, E]
    dos: Array  # [groups, rows · M, E + 1] with o·do behind each
    lse: Array  # [groups, rows · M]


def _tile_backward(
    operands: _Operands, squares: tuple[Array, Array], by_key: list[Array], tile: _Tile, task: _Task
) -> None:
    """Add the tile's share of dk, before its scale, and of dv to `by_key`; write dq over its queries."""
    keys, values = operands.keys[:, : tile.seen], operands.values[:, : tile.seen]
    queries, dos = operands.queries[:, tile.columns], operands.dos[:, tile.columns]
    p, ds = (square[:, : tile.seen, : queries.shape[1]] for square in squares)
    np.matmul(keys, queries.swapaxes(1, 2), out=p)
    _hide(p, tile, task)
    p -= operands.lse[:, None, tile.columns]
    np.exp(p, out=p)
    np.matmul(values, dos.swapaxes(1, 2), out=ds)
    ds *= p
    *totals, share = by_key
    for total, weights, rows in zip(totals, (ds, p), (queries, dos[..., :-1]), strict=True):
        if tile.seen == total.shape[1]:
            np.matmul(weights, rows, out=total)
        else:
            total[:, : tile.seen] += np.matmul(weights, rows, out=share[:, : tile.seen])
    np.matmul(ds.swapaxes(1, 2), keys, out=queries)


def _hide(scores: Array, tile: _Tile, task: _Task) -> None:
    """Make the scores [groups, seen, columns] -inf where a query must not look."""
    own, columns = tile.seen - tile.first, scores.shape[2]
    shared = columns // own
    diagonal = scores[:, tile.first :]
    diagonal += _later(MOST_ROWS, shared, scores.dtype)[:own, :columns]
    for start in task.starts:
        # keys before the start of a sequence, from its own first query on
        scores[:, :start, max(0, start - tile.first) * shared :] = -np.inf


@lru_cache(maxsize=4)
def _later(rows: int, shared: int, dtype: Any) -> Array:
    """Return -inf where a key comes after a query, else 0: [keys, queries · heads], of the same rows."""
    later = np.repeat(np.tri(rows, k=-1, dtype=bool), shared, axis=1)
    return np.where(later, -np.inf, 0).astype(dtype)


def _tiles(groups: int, rows: int, shared: int) -> list[_Tile]:
    """Cut the rows of a task into tiles of one size, the last one smaller."""
    most = max(LEAST_ROWS, min(ROWS, TILE_SCORES // (groups * rows * shared)))
    step = ceil(rows / max(1, round(rows / most)))
    starts = range(0, rows, step)
    ends = [min(start + step, rows) for start in starts]
    return [
        _Tile(slice(first * shared, end * shared), first, end)
        for first, end in zip(starts, ends, strict=True)
    ]


def _backward_shapes(groups: int, rows: int, shared: int, width: int) -> list[tuple[int, ...]]:
    """Return the shapes of a task's scratch in backward: its operands, two squares of scores, three sums."""
    padded, scores = width + _APART, (groups, rows, _tiles(groups, rows, shared)[0].columns.stop)
    by_key, by_query = (groups, rows), (groups, rows, shared)
    operands = [(*by_key, width), (*by_key, padded), (*by_query, width), (*by_query, padded), by_query]
    return [*operands, scores, scores, *[(*by_key, width)] * 3]


def scratch_elements(groups: int, rows: int, shared: int, width: int) -> int:
    """Return what a thread keeps of scratch for a task of `groups` keys' heads, `shared` queries' to each."""
    return sum(map(prod, _backward_shapes(groups, rows, shared, width)))


def _tasks(saved: Saved) -> Iterator[_Task]:
    """Cut sequences and heads into tasks, the longest first: no thread is left alone with one at the end."""
    bounds: list[int] = saved.cu_seqlens.tolist()
    groups = saved.k.shape[1]
    shared = saved.q.shape[1] // groups
    spans = sorted(runs(bounds), key=lambda span: span[0] - span[1])
    work = sum((last - first) ** 2 for first, last in spans)
    for first, last in spans:
        starts = bounds[bisect_right(bounds, first) : bisect_left(bounds, last)]
        # groups part where one run is more than a thread's share
        together = groups if thread_count() * (last - first) ** 2 <= work else 1
        for group in range(0, groups, together):
            heads = slice(group * shared, (group + together) * shared)
            yield _Task(
                slice(first, last),
                slice(group, group + together),
                heads,
                tuple(start - first for start in starts),
            )
