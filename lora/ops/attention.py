"""Causal softmax attention over packed sequences, with query heads that share key-value heads.

    o_n = Σ_m p_nm v_m        p_nm = exp(scale · q_n·k_m - lse_n)        lse_n = log Σ_m exp(scale · q_n·k_m)

over the tokens m <= n of n's own sequence. Query head h reads key-value head h // (H / G).

Probabilities exist for one tile at a time, a range of query rows against the keys that these may see, and
backward computes them again from `lse`. M = H / G query heads share a key-value head and one product.

Contract: contracts/ops/attention.yaml. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads:
Ainslie et al. 2023, arXiv:2305.13245; the recomputation: Dao et al. 2022, arXiv:2205.14135, appendix B.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lora.backend import Array, accumulation_dtype, array_module, empty, matmul, to_host, wide
from lora.errors import ShapeError

TILE_SCORES = 2**20  # scores that exist at once, over all heads: 4 MB in float32, so that they stay in cache
JOINED_TOKENS = (
    64  # neighbouring sequences that are together as short as this share a tile: fewer, larger products
)


class Saved(NamedTuple):
    """Linear in the tokens: no score is kept."""

    q: Array  # [N, H, E]
    k: Array  # [N, G, E]
    v: Array  # [N, G, E]
    o: Array  # [N, H, E] dtype of q
    lse: Array  # [N, H]  accumulation dtype
    cu_seqlens: Array  # [S+1]
    scale: float


class Grads(NamedTuple):
    """In the dtype of each input."""

    q: Array  # [N, H, E]
    k: Array  # [N, G, E]
    v: Array  # [N, G, E]


class _Tile(NamedTuple):
    """Query rows against the keys that at least one of them sees; `seen` ends where `rows` ends."""

    rows: slice
    seen: slice
    hidden: Array  # [rows, rows] added to the scores of the last keys: -inf where a row must not look, else 0


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
    xp = array_module(q, k, v, cu_seqlens)
    check_shapes(q, k, v, cu_seqlens)
    groups, keys, values = k.shape[1], _heads_first(k), _heads_first(v)
    o = empty(q.shape, q.dtype, like=q)
    lse = empty((*q.shape[:2], 1), accumulation_dtype(q.dtype), like=q)
    for tile in _tiles(q, cu_seqlens):
        scores = _scores(_by_group(q[tile.rows], groups), keys[:, tile.seen], tile, scale)
        top = scores.max(axis=-1, keepdims=True)
        scores -= top
        weights = xp.exp(scores, out=scores)
        total = weights.sum(axis=-1, keepdims=True)
        _write_tokens(o[tile.rows], matmul(weights, values[:, tile.seen]) / total)
        _write_tokens(lse[tile.rows], top + xp.log(total))
    return o, Saved(q, k, v, o, lse[..., 0], cu_seqlens, scale)


def backward(saved: Saved, do: Array) -> Grads:
    """Return the gradients for q, k and v, given `do` [N, H, E]."""
    q, k, v, o, lse, cu_seqlens, scale = saved
    xp = array_module(q, do)
    groups, keys, values = k.shape[1], _heads_first(k), _heads_first(v)
    # Σ_m p_nm dp_nm, which the softmax takes off each dp, is o·do: no pass over the scores is spent on it
    along = (wide(do) * wide(o)).sum(axis=-1, keepdims=True)
    dq = empty(q.shape, q.dtype, like=q)
    dkeys, dvalues = xp.zeros(keys.shape, keys.dtype), xp.zeros(values.shape, values.dtype)
    for tile in _tiles(q, cu_seqlens):
        q_tile, do_tile = _by_group(q[tile.rows], groups), _by_group(do[tile.rows], groups)
        p = _scores(q_tile, keys[:, tile.seen], tile, scale)
        p -= _by_group(lse[tile.rows, :, None], groups)
        xp.exp(p, out=p)
        dvalues[:, tile.seen] += matmul(p.swapaxes(1, 2), do_tile)
        ds = matmul(do_tile, values[:, tile.seen].swapaxes(1, 2))
        ds -= _by_group(along[tile.rows], groups)
        ds *= p
        _write_tokens(dq[tile.rows], matmul(ds, keys[:, tile.seen]) * scale)
        dkeys[:, tile.seen] += matmul(ds.swapaxes(1, 2), q_tile * scale)
    return Grads(dq, _tokens_first(dkeys, k), _tokens_first(dvalues, v))


def check_shapes(q: Array, k: Array, v: Array, cu_seqlens: Array) -> None:
    """Check that the arrays of `forward` fit each other, and that the boundaries run from 0 to N."""
    fits = k.shape == v.shape and q.shape[::2] == k.shape[::2] and q.shape[1] % k.shape[1] == 0
    if not fits or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != q.shape[0]:
        raise ShapeError(
            "expected q [N, H, E], k and v [N, G, E], G a divisor of H, and boundaries from 0 to N; got q "
            f"{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
            f"boundaries from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )


def _scores(queries: Array, keys: Array, tile: _Tile, scale: float) -> Array:
    """Return scale · q·k [G, M·rows, seen], -inf where the key is later or of another sequence."""
    scores = matmul(queries * scale, keys.swapaxes(1, 2))
    rows = tile.hidden.shape[0]
    by_head = scores.reshape(-1, rows, scores.shape[-1])
    # keys before the tile's first row belong to the one sequence of a long tile: every row sees them
    by_head[:, :, -rows:] += tile.hidden
    return scores


def _tiles(q: Array, cu_seqlens: Array) -> Iterator[_Tile]:
    """Cut the packed rows into tiles: a long sequence in blocks of rows, neighbouring short ones together."""
    xp, heads, dtype = array_module(q), q.shape[1], accumulation_dtype(q.dtype)
    bounds: list[int] = to_host(cu_seqlens).tolist()
    tokens = xp.arange(q.shape[0])
    sequence_start = xp.repeat(cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1])
    for first, last in runs(bounds):
        # never less than JOINED_TOKENS, so that a tile cut from a run holds rows of one sequence alone
        step = max(JOINED_TOKENS, TILE_SCORES // (heads * (last - first)))
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            keys, queries = tokens[rows], tokens[rows, None]
            visible = (keys <= queries) & (keys >= sequence_start[rows, None])
            yield _Tile(rows, slice(first, rows.stop), xp.where(visible, 0, -xp.inf).astype(dtype))


def runs(bounds: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of every long sequence alone and of neighbouring short sequences together."""
    first, last = 0, 0
    for stop in bounds[1:]:
        if stop - first > JOINED_TOKENS and last > first:
            yield first, last
            first = last
        last = stop
    if last > first:
        yield first, last


def _by_group(rows: Array, groups: int) -> Array:
    """Return [rows, H, E] as wide [G, M·rows, E]: the heads that share keys become rows of one matrix."""
    count, heads, width = rows.shape
    grouped = wide(rows).reshape(count, groups, heads // groups, width).transpose(1, 2, 0, 3)
    return grouped.reshape(groups, -1, width)


def _write_tokens(out: Array, grouped: Array) -> None:
    """Write [G, M·rows, E] into `out` [rows, H, E], undoing `_by_group`."""
    count, heads, width = out.shape
    groups = grouped.shape[0]
    by_head = grouped.reshape(groups, heads // groups, count, width)
    out.reshape(count, groups, heads // groups, width)[...] = by_head.transpose(2, 0, 1, 3)


def _heads_first(x: Array) -> Array:
    """Return [N, G, E] as a wide view [G, N, E]; nothing is repeated for the heads that share it."""
    return wide(x).swapaxes(0, 1)


def _tokens_first(dx: Array, like: Array) -> Array:
    """Return [G, N, E] as a contiguous [N, G, E] in the dtype of `like`."""
    out = empty(like.shape, like.dtype, like=like)
    out[...] = dx.swapaxes(0, 1)
    return out
