"""Linear attention whose state is a memory: a token decays it, corrects what its key recalls, and reads it.

    S' = exp(g_n) S      S <- S' + k_n β_n (v_n - S'ᵀ k_n)ᵀ      o_n = Sᵀ q_n      S [K, W], one a value head

with k = l2(k), q = l2(q) / sqrt(K), β = sigmoid(b), g = -exp(A_log) softplus(a + dt_bias). M = H / G value
heads share a key head. Every sequence has a state of its own, in the accumulation dtype.

Tokens are taken in chunks. Within one, with c the running sum of g, D_ij = exp(c_i - c_j) for i >= j and
L = tril(diag(β) K Kᵀ ∘ D, -1), the corrections V' of all its tokens solve one triangular system:

    T = (I + L)⁻¹        U = T diag(β) V        X = T diag(β e^c) K        V' = U - X S
    O = diag(e^c) Q S + (Q Kᵀ ∘ D) V'           S <- e^{c_last} S + (diag(e^{c_last - c}) K)ᵀ V'

A chunk of one token is the recurrence itself, so generation runs through the same code. Sequences and heads
move through their n-th chunks together; a sequence's last chunk is filled up with tokens that do nothing, of
β = g = 0. Backward keeps the inputs alone and computes the chunks again.

Contract: contracts/ops/gated_delta_rule.yaml. Source: Yang et al. 2024, arXiv:2412.06464 (the recurrence) and
arXiv:2406.06484 (the triangular system).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lora.backend import Array, accumulation_dtype, array_module, empty, matmul, to_host, wide
from lora.errors import ShapeError
from lora.ops._logistic import sigmoid, softplus

CHUNK = 64  # tokens: their triangular system still costs less than the products around it
STEP_ELEMENTS = 2**18  # of one chunked array in a step, 1 MB in float32: a step's arrays stay in cache
L2_EPS = 1e-6  # added to |q|² and |k|², as Transformers does


class Saved(NamedTuple):
    """The inputs: no state and no chunk is kept."""

    q: Array  # [N, G, K]
    k: Array  # [N, G, K]
    v: Array  # [N, H, W]
    a: Array  # [N, H]
    b: Array  # [N, H]
    A_log: Array  # [H]
    dt_bias: Array  # [H]
    cu_seqlens: Array  # [S+1]
    initial_state: Array | None  # [S, H, K, W]


class Grads(NamedTuple):
    """Activations in their own dtype; A_log and dt_bias are frozen unless asked for."""

    q: Array  # [N, G, K]
    k: Array  # [N, G, K]
    v: Array  # [N, H, W]
    a: Array  # [N, H]
    b: Array  # [N, H]
    A_log: Array | None  # [H] accumulation dtype
    dt_bias: Array | None  # [H] accumulation dtype
    initial_state: Array | None  # [S, H, K, W] accumulation dtype; None where none was given


class _Step(NamedTuple):
    """Chunks that are computed at once: the n-th ones of neighbouring sequences."""

    chunks: slice
    states: slice  # of those sequences, in the layout's order


class _Layout(NamedTuple):
    """Where the tokens go: all first chunks, all second ones, ...; in each the longest sequences first."""

    size: int  # C, tokens of a chunk
    slots: Array  # [N] the place of each token among the places of all chunks
    order: Array  # [S] the sequences, longest first
    steps: tuple[_Step, ...]  # in order of time


class _Tokens(NamedTuple):
    """Tokens in chunks, [chunks, G, M or 1, C, width]."""

    q: Array  # [.., 1, C, K] of length 1 / sqrt(K)
    k: Array  # [.., 1, C, K] of length 1
    v: Array  # [.., M, C, W]
    g: Array  # [.., M, C, 1] log of the decay
    beta: Array  # [.., M, C, 1]


class _Chunk(NamedTuple):
    """What a chunk is, whatever state it meets; in the letters of the module's equations."""

    since_start: Array  # [.., C, 1] e^c
    until_end: Array  # [.., C, 1] e^{c_last - c}
    decay: Array  # [.., C, C] D
    overlap: Array  # [.., C, C] K Kᵀ ∘ D below the diagonal: L without its β
    solve: Array  # [.., C, C] T
    u: Array  # [.., C, W] U
    x: Array  # [.., C, K] X
    scores: Array  # [.., C, C] Q Kᵀ ∘ D

    @property
    def over_all(self) -> Array:
        """The decay from the start of the chunk to its end, [.., 1, 1]."""
        return self.since_start[..., -1:, :]


def forward(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    A_log: Array,
    dt_bias: Array,
    cu_seqlens: Array,
    initial_state: Array | None = None,
    *,
    wants_state: bool = False,
) -> tuple[tuple[Array, Array | None], Saved]:
    """Return ((o, state), Saved): o [N, H, W] in v's dtype, and the state [S, H, K, W] after each sequence.

    Args:
        q: [N, G, K] queries, of any length.
        k: [N, G, K] keys, of any length.
        v: [N, H, W] values; G divides H.
        a: [N, H] what the decay depends on.
        b: [N, H] what the strength β of the correction depends on.
        A_log: [H] log of the rate of the decay, float32.
        dt_bias: [H] added to a, float32.
        cu_seqlens: [S+1] integer boundaries of the sequences, from 0 to N.
        initial_state: [S, H, K, W] the state before each sequence, or None for zeros.
        wants_state: return the state, for generation to go on from; else None in its place.

    Raises:
        ShapeError: the arrays do not fit.
    """
    saved = Saved(q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state)
    _check_shapes(saved)
    layout = _layout(saved)
    tokens, state = _tokens(saved, layout), _first_state(saved, layout)
    flat_o = empty((_places(layout), *tokens.v.shape[1:3], v.shape[2]), tokens.v.dtype, like=v)
    o = _in_chunks(flat_o, layout)
    for step in layout.steps:
        now = _at(tokens, step)
        o[step.chunks], state[step.states] = _advance(now, _chunk(now), state[step.states])
    return (_in_order(flat_o, layout, v), _in_sequence(state, saved, layout) if wants_state else None), saved


def backward(saved: Saved, do: Array, dstate: Array | None = None, *, wants_decay: bool = False) -> Grads:
    """Return the gradients, given `do` [N, H, W] and `dstate` [S, H, K, W] for the state after each sequence.

    `wants_decay` asks for those of A_log and dt_bias, which are frozen under LoRA.
    """
    layout = _layout(saved)
    tokens = _tokens(saved, layout)
    met = _states_met(tokens, _first_state(saved, layout), layout)
    do_chunks = _in_chunks(_spread(wide(do).reshape(len(do), *tokens.v.shape[1:3], -1), layout), layout)
    dstates = _as_state(dstate, saved, layout)
    flat = [empty((_places(layout), *t.shape[1:3], t.shape[4]), t.dtype, like=t) for t in tokens]
    views = [_in_chunks(array, layout) for array in flat]
    for step, state in zip(reversed(layout.steps), reversed(met), strict=True):
        now, do_now = _at(tokens, step), do_chunks[step.chunks]
        grads, dstates[step.states] = _retreat(now, _chunk(now), state, do_now, dstates[step.states])
        for view, grad in zip(views, grads, strict=True):
            view[step.chunks] = grad
    dtokens = _Tokens(*(array[layout.slots] for array in flat))
    dinitial = _in_sequence(dstates, saved, layout) if saved.initial_state is not None else None
    return _input_grads(saved, dtokens, dinitial, wants_decay=wants_decay)


def _check_shapes(saved: Saved) -> None:
    q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state = saved
    array_module(q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state)
    rows, heads, width = v.shape
    shape = (cu_seqlens.size - 1, heads, q.shape[2], width)
    fits = (
        q.shape == k.shape
        and q.shape[0] == rows
        and heads % q.shape[1] == 0
        and a.shape == b.shape == (rows, heads)
        and A_log.shape == dt_bias.shape == (heads,)
        and (initial_state is None or initial_state.shape == shape)
    )
    if not fits or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows:
        shapes = [None if array is None else list(array.shape) for array in saved]
        raise ShapeError(
            "q, k [N, G, K], v [N, H, W], a, b [N, H], A_log, dt_bias [H], cu_seqlens [S+1] from 0 to N and "
            f"initial_state [S, H, K, W] do not fit: {shapes}"
        )


def _layout(saved: Saved) -> _Layout:
    bounds = to_host(saved.cu_seqlens)
    lengths = bounds[1:] - bounds[:-1]
    size = int(min(CHUNK, lengths.max()))
    order = np.argsort(-lengths, kind="stable")
    chunks = -(-lengths // size)
    ends = np.cumsum([0, *((chunks > n).sum() for n in range(chunks.max()))])
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    offset = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    slots = (ends[offset // size] + np.repeat(rank, lengths)) * size + offset % size
    xp, most = array_module(saved.v), max(1, STEP_ELEMENTS // (size * saved.v[0].size))
    steps = []
    for first, end in pairwise(ends.tolist()):
        for start in range(first, end, most):
            stop = min(start + most, end)
            steps.append(_Step(slice(start, stop), slice(start - first, stop - first)))
    return _Layout(size, xp.asarray(slots), xp.asarray(order), tuple(steps))


def _places(layout: _Layout) -> int:
    return layout.steps[-1].chunks.stop * layout.size


def _spread(x: Array, layout: _Layout) -> Array:
    """Return `x` [N, ...] at its slots [places, ...], zeros between the sequences."""
    flat = array_module(x).zeros((_places(layout), *x.shape[1:]), x.dtype)
    flat[layout.slots] = x
    return flat


def _in_chunks(flat: Array, layout: _Layout) -> Array:
    """Return [places, G, M, width] as a view [chunks, G, M, C, width]."""
    return flat.reshape(-1, layout.size, *flat.shape[1:]).transpose(0, 2, 3, 1, 4)


def _in_order(flat: Array, layout: _Layout, like: Array) -> Array:
    """Return [places, G, M, width] as the tokens [N, heads, width], in the dtype of `like`."""
    return flat[layout.slots].reshape(like.shape).astype(like.dtype, copy=False)


def _at(tokens: _Tokens, step: _Step) -> _Tokens:
    return _Tokens(*(array[step.chunks] for array in tokens))


def _tokens(saved: Saved, layout: _Layout) -> _Tokens:
    xp, dtype = array_module(saved.v), accumulation_dtype(saved.v.dtype)
    rows, heads, groups = len(saved.v), saved.v.shape[1], saved.k.shape[1]
    rate = -xp.exp(saved.A_log.astype(dtype))
    g = rate * softplus(wide(saved.a) + saved.dt_bias.astype(dtype))
    beta = sigmoid(wide(saved.b))
    per_value_head = (wide(saved.v), g, beta)
    q, k = _unit(saved.q) * saved.q.shape[2] ** -0.5, _unit(saved.k)
    arrays = [q[:, :, None], k[:, :, None]]
    arrays += [array.reshape(rows, groups, heads // groups, -1) for array in per_value_head]
    return _Tokens(*(_in_chunks(_spread(array, layout), layout) for array in arrays))


def _rstd(x: Array) -> Array:
    xp, x = array_module(x), wide(x)
    return 1 / xp.sqrt(_sum(x * x) + L2_EPS)


def _unit(x: Array) -> Array:
    return wide(x) * _rstd(x)


def _first_state(saved: Saved, layout: _Layout) -> Array:
    return _as_state(saved.initial_state, saved, layout)


def _as_state(state: Array | None, saved: Saved, layout: _Layout) -> Array:
    """Return a state [S, H, K, W], or zeros for None, as a fresh [S, G, M, K, W] in the layout's order."""
    xp, (groups, width) = array_module(saved.v), saved.k.shape[1:]
    shape = (layout.order.size, groups, saved.v.shape[1] // groups, width, saved.v.shape[2])
    dtype = accumulation_dtype(saved.v.dtype)
    if state is None:
        return xp.zeros(shape, dtype)
    return state[layout.order].astype(dtype).reshape(shape)


def _in_sequence(state: Array, saved: Saved, layout: _Layout) -> Array:
    """Return a state in the layout's order as [S, H, K, W] in the order of the sequences."""
    out = empty((len(state), saved.v.shape[1], *state.shape[3:]), state.dtype, like=state)
    out[layout.order] = state.reshape(out.shape)
    return out


def _chunk(now: _Tokens) -> _Chunk:
    xp, (q, k, v, g, beta) = array_module(now.v), now
    # in float64: after one strong decay the small differences of later sums would lose their digits
    total = xp.cumsum(g, axis=-2, dtype="float64")
    # the mask comes before the exponential: above the diagonal c_i - c_j is positive and may overflow
    lower = xp.tri(total.shape[-2], dtype=bool)
    decay = xp.exp(xp.where(lower, total - _t(total), -xp.inf).astype(g.dtype))
    overlap = _below(matmul(k, _t(k)) * decay)
    solve = _unit_lower_inverse(beta * overlap)
    since_start = xp.exp(total.astype(g.dtype))
    return _Chunk(
        since_start=since_start,
        until_end=xp.exp((total[..., -1:, :] - total).astype(g.dtype)),
        decay=decay,
        overlap=overlap,
        solve=solve,
        u=matmul(solve, beta * v),
        x=matmul(solve, beta * since_start * k),
        scores=matmul(q, _t(k)) * decay,
    )


def _unit_lower_inverse(lower: Array) -> Array:
    """Return (I + L)⁻¹ for strictly lower L [.., C, C], by forward substitution: no row reads a later one."""
    xp, size = array_module(lower), lower.shape[-1]
    inverse = xp.zeros_like(lower)
    inverse[...] = xp.eye(size, dtype=lower.dtype)
    for row in range(1, size):
        inverse[..., row : row + 1, :row] = -matmul(lower[..., row : row + 1, :row], inverse[..., :row, :row])
    return inverse


def _advance(now: _Tokens, chunk: _Chunk, state: Array) -> tuple[Array, Array]:
    """Return the outputs of a chunk, and the state after it."""
    written = chunk.u - matmul(chunk.x, state)
    o = chunk.since_start * matmul(now.q, state) + matmul(chunk.scores, written)
    new = matmul(_t(chunk.until_end * now.k), written)
    new += chunk.over_all * state
    return o, new


def _states_met(tokens: _Tokens, state: Array, layout: _Layout) -> list[Array]:
    """Return the states that the chunks of each step meet; `state` is moved to the end."""
    met = []
    for step in layout.steps:
        now = _at(tokens, step)
        met.append(state[step.states].copy())
        state[step.states] = _advance(now, _chunk(now), met[-1])[1]
    return met


def _retreat(now: _Tokens, chunk: _Chunk, state: Array, do: Array, dstate: Array) -> tuple[_Tokens, Array]:
    """Return the gradients of a chunk's tokens and of the state that it met, given those of what it made."""
    q, k, v, _, beta = now
    written = chunk.u - matmul(chunk.x, state)
    dwritten = matmul(_t(chunk.scores), do) + matmul(chunk.until_end * k, dstate)
    dpairs = matmul(do, _t(written))
    read = chunk.since_start * matmul(do, _t(state))
    kept = chunk.until_end * matmul(written, _t(dstate))
    # through T by the right sides of its system: dL = -(Tᵀ dU) Uᵀ - (Tᵀ dX) Xᵀ, below the diagonal
    dright_u = matmul(_t(chunk.solve), dwritten)
    dright_x = matmul(_t(chunk.solve), -matmul(dwritten, _t(state)))
    dlower = _below(-matmul(dright_u, _t(chunk.u)) - matmul(dright_x, _t(chunk.x)))
    # through the pairs of tokens, Q Kᵀ and K Kᵀ
    dscores, doverlap = dpairs * chunk.decay, beta * dlower * chunk.decay
    dq = read + matmul(dscores, k)
    dk = kept + matmul(_t(dscores), q) + beta * chunk.since_start * dright_x
    dk += matmul(doverlap + _t(doverlap), k)
    # through the running sum c of g: every D_ij counts for i and against j
    by_key = chunk.since_start * _sum(dright_x * k)
    pairs = dpairs * chunk.scores + beta * dlower * chunk.overlap
    dc = _sum(q * read) - _sum(k * kept) + beta * by_key + _sum(pairs) - _sum(_t(pairs))
    dc[..., -1:, :] += (k * kept).sum(axis=(-2, -1), keepdims=True)
    dc[..., -1:, :] += chunk.over_all * (state * dstate).sum(axis=(-2, -1), keepdims=True)
    dtokens = _Tokens(
        q=dq.sum(axis=2, keepdims=True),
        k=dk.sum(axis=2, keepdims=True),
        v=beta * dright_u,
        g=array_module(dc).flip(dc, -2).cumsum(axis=-2)[..., ::-1, :],
        beta=_sum(dright_u * v) + by_key + _sum(dlower * chunk.overlap),
    )
    dmet = chunk.over_all * dstate + matmul(_t(chunk.since_start * q), do) - matmul(_t(chunk.x), dwritten)
    return dtokens, dmet


def _input_grads(saved: Saved, dtokens: _Tokens, dinitial: Array | None, *, wants_decay: bool) -> Grads:
    """Return the gradients of the inputs, given those of the tokens [N, G, M or 1, width] made of them."""
    xp, dtype = array_module(saved.v), accumulation_dtype(saved.v.dtype)
    dv, dg, dbeta = (
        d.reshape(array.shape) for d, array in zip(dtokens[2:], (saved.v, saved.a, saved.b), strict=True)
    )
    rate = -xp.exp(saved.A_log.astype(dtype))
    biased = wide(saved.a) + saved.dt_bias.astype(dtype)
    da, beta = dg * rate * sigmoid(biased), sigmoid(wide(saved.b))
    return Grads(
        q=_through_unit(saved.q, dtokens.q[:, :, 0] * saved.q.shape[2] ** -0.5),
        k=_through_unit(saved.k, dtokens.k[:, :, 0]),
        v=dv.astype(saved.v.dtype, copy=False),
        a=da.astype(saved.a.dtype, copy=False),
        b=(dbeta * beta * (1 - beta)).astype(saved.b.dtype, copy=False),
        A_log=(dg * rate * softplus(biased)).sum(axis=0) if wants_decay else None,
        dt_bias=da.sum(axis=0) if wants_decay else None,
        initial_state=dinitial,
    )


def _through_unit(x: Array, dy: Array) -> Array:
    """Return the gradient for x of y = x / |x|, in x's dtype: what would only lengthen x drops out."""
    y = _unit(x)
    return (_rstd(x) * (dy - y * _sum(y * dy))).astype(x.dtype, copy=False)


def _t(matrices: Array) -> Array:
    return matrices.swapaxes(-1, -2)


def _sum(rows: Array) -> Array:
    return rows.sum(axis=-1, keepdims=True)


def _below(matrices: Array) -> Array:
    """Return [.., C, C] with zeros on and above the diagonal."""
    xp, size = array_module(matrices), matrices.shape[-1]
    return matrices * xp.tri(size, k=-1, dtype=matrices.dtype)
