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

from typing import Any, NamedTuple

from lora.backend import Array, accumulation_dtype, array_module, empty, matmul, wide
from lora.errors import ShapeError
from lora.ops._chunk_layout import Layout, Step, chunk_layout
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
    x: Array | None  # [.., C, K] X; None where no state is met
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
    check_shapes(saved)
    layout = _layout(saved)
    tokens, states = _tokens(saved, layout), _states(initial_state, saved, layout)
    flat = empty((layout.places, *tokens.v.shape[1:3], v.shape[2]), tokens.v.dtype, like=v)
    o = layout.in_chunks(flat)
    for step in layout.steps:
        now, met = _at(tokens, step), _met(states, step, saved)
        chunk = _chunk(now, meets=met is not None)
        written = _written(chunk, met)
        o[step.chunks] = _read(now, chunk, met, written)
        if wants_state or not step.last:
            states[step.sequences] = _made(now, chunk, met, written)
    o = flat[layout.slots].reshape(v.shape).astype(v.dtype, copy=False)
    return (o, _by_sequence(states, saved, layout) if wants_state else None), saved


def backward(saved: Saved, do: Array, dstate: Array | None = None, *, wants_decay: bool = False) -> Grads:
    """Return the gradients, given `do` [N, H, W] and `dstate` [S, H, K, W] for the state after each sequence.

    `wants_decay` asks for those of A_log and dt_bias, which are frozen under LoRA.
    """
    layout = _layout(saved)
    tokens = _tokens(saved, layout)
    all_met = _all_met(tokens, saved, layout)
    do_chunks = layout.in_chunks(layout.spread(wide(do).reshape(len(do), *tokens.v.shape[1:3], -1)))
    dstates = _states(dstate, saved, layout)
    flat = [empty((layout.places, *t.shape[1:3], t.shape[4]), t.dtype, like=t) for t in tokens]
    views = [layout.in_chunks(array) for array in flat]
    for step, met in zip(reversed(layout.steps), reversed(all_met), strict=True):
        now, do_now = _at(tokens, step), do_chunks[step.chunks]
        dmade = dstates[step.sequences] if dstate is not None or not step.last else None
        grads, dmet = _retreat(now, _chunk(now, meets=met is not None), met, do_now, dmade)
        for view, grad in zip(views, grads, strict=True):
            view[step.chunks] = grad
        if dmet is not None:
            dstates[step.sequences] = dmet
    dtokens = _Tokens(*(array[layout.slots] for array in flat))
    dinitial = _by_sequence(dstates, saved, layout) if saved.initial_state is not None else None
    return _input_grads(saved, dtokens, dinitial, wants_decay=wants_decay)


def check_shapes(saved: Saved) -> None:
    """Check that the inputs fit each other, and that the boundaries run from 0 to N."""
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


def _layout(saved: Saved) -> Layout:
    per_token = max(saved.v[0].size, saved.v.shape[1] * saved.k.shape[2])
    return chunk_layout(saved.cu_seqlens, largest=CHUNK, tokens_at_once=STEP_ELEMENTS // per_token)


def _at(tokens: _Tokens, step: Step) -> _Tokens:
    return _Tokens(*(array[step.chunks] for array in tokens))


def _tokens(saved: Saved, layout: Layout) -> _Tokens:
    xp, dtype = array_module(saved.v), accumulation_dtype(saved.v.dtype)
    rows, heads, groups = len(saved.v), saved.v.shape[1], saved.k.shape[1]
    rate = -xp.exp(saved.A_log.astype(dtype))
    g = rate * softplus(wide(saved.a) + saved.dt_bias.astype(dtype))
    beta = sigmoid(wide(saved.b))
    per_value_head = (wide(saved.v), g, beta)
    q, k = _unit(saved.q) * saved.q.shape[2] ** -0.5, _unit(saved.k)
    arrays = [q[:, :, None], k[:, :, None]]
    arrays += [array.reshape(rows, groups, heads // groups, -1) for array in per_value_head]
    return _Tokens(*(layout.in_chunks(layout.spread(array)) for array in arrays))


def _rstd(x: Array) -> Array:
    xp, x = array_module(x), wide(x)
    return 1 / xp.sqrt(_sum(x * x) + L2_EPS)


def _unit(x: Array) -> Array:
    return wide(x) * _rstd(x)


def _states(state: Array | None, saved: Saved, layout: Layout) -> Array:
    """Return a state [S, H, K, W], or zeros for None, as a fresh [S, G, M, K, W] in the layout's order."""
    xp, (groups, width) = array_module(saved.v), saved.k.shape[1:]
    shape = (layout.order.size, groups, saved.v.shape[1] // groups, width, saved.v.shape[2])
    dtype = accumulation_dtype(saved.v.dtype)
    if state is None:
        return xp.zeros(shape, dtype)
    return state[layout.order].astype(dtype, copy=False).reshape(shape)


def _by_sequence(states: Array, saved: Saved, layout: Layout) -> Array:
    """Return states in the layout's order as [S, H, K, W] in the order of the sequences."""
    out = empty((len(states), saved.v.shape[1], *states.shape[3:]), states.dtype, like=states)
    out[layout.order] = states.reshape(out.shape)
    return out


def _met(states: Array, step: Step, saved: Saved) -> Array | None:
    """Return the states that the chunks of `step` meet, or None for zeros: most products are spared then."""
    return None if step.first and saved.initial_state is None else states[step.sequences]


def _all_met(tokens: _Tokens, saved: Saved, layout: Layout) -> list[Array | None]:
    """Return what `_met` is at every step."""
    states, all_met = _states(saved.initial_state, saved, layout), []
    for step in layout.steps:
        met = _met(states, step, saved)
        all_met.append(None if met is None else met.copy())
        if not step.last:
            now = _at(tokens, step)
            chunk = _chunk(now, meets=met is not None)
            states[step.sequences] = _made(now, chunk, met, _written(chunk, met))
    return all_met


def _chunk(now: _Tokens, *, meets: bool) -> _Chunk:
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
        x=matmul(solve, beta * since_start * k) if meets else None,
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


def _written(chunk: _Chunk, met: Array | None) -> Array:
    """Return V', what the chunk's keys write."""
    return chunk.u if met is None else chunk.u - matmul(chunk.x, met)


def _read(now: _Tokens, chunk: _Chunk, met: Array | None, written: Array) -> Array:
    """Return O, what the chunk's queries read."""
    o = matmul(chunk.scores, written)
    return o if met is None else o + chunk.since_start * matmul(now.q, met)


def _made(now: _Tokens, chunk: _Chunk, met: Array | None, written: Array) -> Array:
    """Return the state after the chunk."""
    made = matmul(_t(chunk.until_end * now.k), written)
    return made if met is None else made + chunk.over_all * met


class _Shares(NamedTuple):
    """What flows through a state to a chunk's tokens; zeros where there is no state."""

    q: Any = 0.0
    k: Any = 0.0
    c: Any = 0.0
    beta: Any = 0.0
    lower: Any = 0.0  # of L


def _retreat(
    now: _Tokens, chunk: _Chunk, met: Array | None, do: Array, dmade: Array | None
) -> tuple[_Tokens, Array | None]:
    """Return the gradients of a chunk's tokens and of the state that it met, given those of what it made."""
    q, k, v, _, beta = now
    written, dwritten = _written(chunk, met), matmul(_t(chunk.scores), do)
    made, past, dmet = _Shares(), _Shares(), None
    if dmade is not None:
        dwritten += matmul(chunk.until_end * k, dmade)
        made = _through_made(now, chunk, met, written, dmade)
    if met is not None:
        past, dmet = _through_met(now, chunk, met, do, dwritten)
        dmet += chunk.over_all * dmade if dmade is not None else 0
    # through T by the right sides of its system: dL = -(Tᵀ dU) Uᵀ - (Tᵀ dX) Xᵀ, below the diagonal
    dright = matmul(_t(chunk.solve), dwritten)
    dlower = _below(past.lower - matmul(dright, _t(chunk.u)))
    # through the pairs of tokens; D_ij counts for c_i and against c_j
    dpairs = matmul(do, _t(written))
    dscores, doverlap = dpairs * chunk.decay, beta * dlower * chunk.decay
    pairs = dpairs * chunk.scores + beta * dlower * chunk.overlap
    dq = past.q + matmul(dscores, k)
    dk = past.k + made.k + matmul(_t(dscores), q) + matmul(doverlap + _t(doverlap), k)
    dc = past.c + made.c + _sum(pairs) - _sum(_t(pairs))
    return _Tokens(
        q=dq.sum(axis=2, keepdims=True),
        k=dk.sum(axis=2, keepdims=True),
        v=beta * dright,
        g=dc[..., ::-1, :].cumsum(axis=-2)[..., ::-1, :],
        beta=past.beta + _sum(dright * v) + _sum(dlower * chunk.overlap),
    ), dmet


def _through_made(now: _Tokens, chunk: _Chunk, met: Array | None, written: Array, dmade: Array) -> _Shares:
    """Return what flows back from the state after the chunk, with V' held still."""
    kept = chunk.until_end * matmul(written, _t(dmade))
    along = _sum(now.k * kept)
    dc = -along
    dc[..., -1:, :] += along.sum(axis=-2, keepdims=True)
    if met is not None:
        dc[..., -1:, :] += chunk.over_all * (met * dmade).sum(axis=(-2, -1), keepdims=True)
    return _Shares(k=kept, c=dc)


def _through_met(
    now: _Tokens, chunk: _Chunk, met: Array, do: Array, dwritten: Array
) -> tuple[_Shares, Array]:
    """Return what flows through the state before the chunk, by O and by X S, and that state's gradient."""
    q, k, _, _, beta = now
    read = chunk.since_start * matmul(do, _t(met))
    dright = -matmul(_t(chunk.solve), matmul(dwritten, _t(met)))
    by_key = chunk.since_start * _sum(dright * k)
    shares = _Shares(
        q=read,
        k=beta * chunk.since_start * dright,
        c=_sum(q * read) + beta * by_key,
        beta=by_key,
        lower=-matmul(dright, _t(chunk.x)),
    )
    return shares, matmul(_t(chunk.since_start * q), do) - matmul(_t(chunk.x), dwritten)


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
