"""Causal attention over packed sequences on tensor cores: bfloat16, heads of 64, 128 or 256 dimensions.

No boundary is read on the host, which would wait for the device: grids hold as many blocks as the boundaries
could ask for, and each finds its tile itself. Backward goes over the scores twice, by keys and by queries, so
that nothing is added atomically and every run gives the same bits.

Contract: contracts/ops/attention.yaml. Source: Dao 2023, arXiv:2307.08691, section 3.1 and algorithm 1; the
reference is lora/ops/attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._heads import check_heads
from lora.cuda._instances import contiguous
from lora.errors import ShapeError
from lora.ops.attention import Grads, Saved

_FORWARD, _BACKWARD = "attention.cu", "attention_backward.cu"
_WARP = 32
_ROW_WARPS = 4  # of the kernels that go through rows

# of the keys' pass: with fewer, blocks of their own sum parts of a group's heads. Several on each
# multiprocessor of a large GPU even out that tiles differ in work.
ENOUGH_BLOCKS = 1024


class _Tiled(NamedTuple):
    """A kernel whose blocks take a tile of one sequence each."""

    kernel: Kernel
    tokens: int  # of a tile

    def grid(self, cu_seqlens: Array, tokens: int, heads: int) -> tuple[int]:
        """Return a block for each head of every tile that sequences of `tokens` in all can have."""
        sequences = len(cu_seqlens) - 1
        return ((tokens + sequences * (self.tokens - 1)) // self.tokens * heads,)


class _Width(NamedTuple):
    """The instances for one width of heads."""

    forward: _Tiled
    statistics: Kernel
    keys: tuple[_Tiled, ...]  # which together give dk and dv
    queries: _Tiled

    def kernels(self) -> tuple[Kernel, ...]:
        return (self.statistics, *(tiled.kernel for tiled in (self.forward, *self.keys, self.queries)))


def _instance(
    file: str, name: str, template: tuple[int | bool, ...], warps: int, shared_bytes: int
) -> Kernel:
    arguments = ", ".join(str(argument).lower() for argument in template)
    return Kernel(file, f"{name}<{arguments}>", _WARP * warps, shared_bytes)


def _forward(width: int, rows: int, keys: int, warps: int, *, keep_q: bool) -> _Tiled:
    shared_bytes = 2 * width * (rows + 4 * keys)
    template = (width, rows, keys, warps, keep_q)
    return _Tiled(_instance(_FORWARD, "attention_forward", template, warps, shared_bytes), rows)


def _keys(
    width: int, keys: int, rows: int, warps: int, *, keep_k: bool = False, dk: bool = True, dv: bool = True
) -> _Tiled:
    held = keys * (dk + (not keep_k))  # values, and keys that are not in registers
    shared_bytes = 2 * width * (held + 4 * rows) + 16 * rows
    template = (width, keys, rows, warps, keep_k, dk, dv)
    return _Tiled(_instance(_BACKWARD, "attention_backward_keys", template, warps, shared_bytes), keys)


def _queries(width: int, rows: int, keys: int, warps: int, *, keep_q: bool = False) -> _Tiled:
    shared_bytes = 2 * width * (rows * (2 - keep_q) + 4 * keys) + 8 * rows
    template = (width, rows, keys, warps, keep_q)
    return _Tiled(_instance(_BACKWARD, "attention_backward_queries", template, warps, shared_bytes), rows)


def _statistics(width: int) -> Kernel:
    template = (width, _ROW_WARPS)
    return _instance(_BACKWARD, "attention_statistics", template, _ROW_WARPS, 0)


# Tiles as large as 255 registers a thread allow without a spill; benchmarks/NOTES.md has the arithmetic.
_WIDTHS = {
    64: _Width(
        _forward(64, 128, 64, 4, keep_q=True),
        _statistics(64),
        (_keys(64, 128, 32, 4),),
        _queries(64, 128, 64, 4),
    ),
    128: _Width(
        _forward(128, 128, 48, 4, keep_q=False),
        _statistics(128),
        (_keys(128, 128, 64, 8),),
        _queries(128, 128, 32, 4),
    ),
    256: _Width(
        _forward(256, 128, 32, 8, keep_q=True),
        _statistics(256),
        (_keys(256, 128, 32, 8, keep_k=True, dv=False), _keys(256, 128, 32, 8, keep_k=True, dk=False)),
        _queries(256, 128, 32, 8, keep_q=True),
    ),
}

_SUM_PARTS = _instance(_BACKWARD, "attention_sum_parts", (_ROW_WARPS,), _ROW_WARPS, 0)

KERNELS = (*(kernel for width in _WIDTHS.values() for kernel in width.kernels()), _SUM_PARTS)


def forward(q: Array, k: Array, v: Array, cu_seqlens: Array, *, scale: float) -> tuple[Array, Saved]:
    """Return o [N, H, E] in q's dtype, for queries `q` [N, H, E] and `k`, `v` [N, G, E].

    Args:
        q: queries, rotated; bfloat16, and E is 64, 128 or 256.
        k: keys, rotated.
        v: values.
        cu_seqlens: [S+1] boundaries of the sequences, from 0 to N. They stay on the device, unchecked; no
            boundary leads out of an array, whatever it says.
        scale: multiplies every score, positive; E^-0.5.

    Raises:
        ShapeError: the arrays do not fit, or G does not divide H.
        UnsupportedError: there is no kernel for the dtype or the width.
    """
    q, k, v = (contiguous(x) for x in (q, k, v))
    cu_seqlens = contiguous(cu_seqlens, "int64")
    width = _width(q, k, v, scale)
    (tokens, heads, _), groups = q.shape, k.shape[1]
    o = empty(q.shape, q.dtype, like=q)
    lse = empty((tokens, heads), "float32", like=q)
    grid = width.forward.grid(cu_seqlens, tokens, heads)
    sizes = (tokens, len(cu_seqlens) - 1, heads, groups)
    launch(width.forward.kernel, grid, q, k, v, cu_seqlens, o, lse, scale, *sizes)
    return o, Saved(q, k, v, o, lse, cu_seqlens, scale)


def backward(saved: Saved, do: Array) -> Grads:
    """Return the gradients for q, k and v, given `do` [N, H, E]."""
    q, k, v, o, lse, cu_seqlens, scale = saved
    do = contiguous(do)
    width = _width(q, k, v, scale)
    (tokens, heads, e), groups = q.shape, k.shape[1]
    statistics = empty((heads, tokens, 2), "float32", like=q)
    blocks = -(-tokens * heads * (e // 8) // width.statistics.threads)
    launch(width.statistics, (blocks,), o, do, lse, statistics, tokens, heads)
    dq = empty(q.shape, q.dtype, like=q)
    parts = _parts(width.keys[0].grid(cu_seqlens, tokens, groups)[0], heads // groups)
    dk_parts, dv_parts = (empty((parts, *k.shape), k.dtype, like=k) for _ in range(2))
    inputs = (q, k, v, do, statistics, cu_seqlens)
    sizes = (tokens, len(cu_seqlens) - 1, heads, groups)
    for tiled in width.keys:
        grid = tiled.grid(cu_seqlens, tokens, groups * parts)
        launch(tiled.kernel, grid, *inputs, dk_parts, dv_parts, scale, parts, *sizes)
    launch(width.queries.kernel, width.queries.grid(cu_seqlens, tokens, heads), *inputs, dq, scale, *sizes)
    return Grads(dq, _sum(dk_parts), _sum(dv_parts))


def _parts(blocks: int, heads: int) -> int:
    """Return into how many equal parts to cut the `heads` of a group, where whole groups make `blocks`."""
    cuts = [parts for parts in range(1, heads + 1) if heads % parts == 0]
    return next((parts for parts in cuts if parts * blocks >= ENOUGH_BLOCKS), heads)


def _sum(parts: Array) -> Array:
    """Return the sum of `parts` [P, N, G, E] over P, added in the same order in every run."""
    if len(parts) == 1:
        return parts[0]
    total = empty(parts.shape[1:], parts.dtype, like=parts)
    chunks = total.size // 8
    launch(_SUM_PARTS, (-(-chunks // _SUM_PARTS.threads),), parts, total, len(parts), chunks)
    return total


def _width(q: Array, k: Array, v: Array, scale: float) -> _Width:
    """Return the instances for these arrays, or say why there are none."""
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1] or scale <= 0:
        raise ShapeError(
            "expected q [N, H, E], k and v [N, G, E], G a divisor of H, and a positive scale; got q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, scale {scale}"
        )
    check_heads("attention", q, k, v)
    return _WIDTHS[q.shape[2]]
