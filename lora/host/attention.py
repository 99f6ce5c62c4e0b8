"""Causal attention, sequences and groups of heads shared out over threads; defined in lora/ops/attention.py.

No task reads what another one writes: the query heads that share a key-value head are one, for a sequence or
for neighbouring short ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from lora.backend import Array, accumulation_dtype, empty, run_all
from lora.ops import attention as reference
from lora.ops.attention import Grads, Saved, check_shapes, runs


class _Task(NamedTuple):
    """What one thread computes at a time: an attention of its own."""

    rows: slice
    queries: slice  # heads of q
    keys: slice  # the one head of k and v that they share
    cu_seqlens: Array  # from 0 to the task's own rows


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

    def run(task: _Task) -> None:
        rows, heads, keys, bounds = task
        _, saved = reference.forward(q[rows, heads], k[rows, keys], v[rows, keys], bounds, scale=scale)
        o[rows, heads], lse[rows, heads] = saved.o, saved.lse

    run_all([partial(run, task) for task in _tasks(q, k, cu_seqlens)])
    return o, Saved(q, k, v, o, lse, cu_seqlens, scale)


def backward(saved: Saved, do: Array) -> Grads:
    """Return the gradients for q, k and v, given `do` [N, H, E]."""
    q, k, v, o, lse, cu_seqlens, scale = saved
    grads = Grads(*(empty(array.shape, array.dtype) for array in (q, k, v)))

    def run(task: _Task) -> None:
        rows, heads, keys, bounds = task
        part = Saved(
            q[rows, heads], k[rows, keys], v[rows, keys], o[rows, heads], lse[rows, heads], bounds, scale
        )
        dq, dk, dv = reference.backward(part, do[rows, heads])
        grads.q[rows, heads], grads.k[rows, keys], grads.v[rows, keys] = dq, dk, dv

    run_all([partial(run, task) for task in _tasks(q, k, cu_seqlens)])
    return grads


def _tasks(q: Array, k: Array, cu_seqlens: Array) -> Iterator[_Task]:
    """Cut sequences and heads into tasks, the longest first: no thread is left alone with one at the end."""
    groups = k.shape[1]
    shared = q.shape[1] // groups
    spans = sorted(runs(cu_seqlens.tolist()), key=lambda span: span[0] - span[1])
    for first, last in spans:
        inside = (cu_seqlens >= first) & (cu_seqlens <= last)
        for group in range(groups):
            heads = slice(group * shared, (group + 1) * shared)
            yield _Task(slice(first, last), heads, slice(group, group + 1), cu_seqlens[inside] - first)
