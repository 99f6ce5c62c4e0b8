"""The gated delta rule, sequences and heads shared out over threads; defined in lora/ops/gated_delta_rule.py.

A task walks through the chunks of one sequence, for a few heads, so that what it works on stays in a core's
cache. It knows the state that a chunk meets before it solves the chunk's system, and solves for V' at once:

    V' = T diag(β) (V - diag(e^c) K S)

where the definition, which does not, forms U and X. Backward, given dO and dS for the state after the chunk:

    dV' = (Q Kᵀ ∘ D)ᵀ dO + diag(e^{c_last - c}) K dS        R = Tᵀ dV'        dV = diag(β) R
    Y = [diag(e^c) dO; -diag(β e^c) R]                      P = [dO V'ᵀ ∘ D; -diag(β) tril(R V'ᵀ, -1) ∘ D]
    F = Y Sᵀ + P K                                          B = Pᵀ [Q; K] + diag(e^{c_last - c}) V' dSᵀ
    dQ = F_q        dK = F_k + B                            dS <- e^{c_last} dS + [Q; K]ᵀ Y

F flows to a token as the later one of a pair and B as the earlier one. A pair's weight has c_i - c_j in its
exponent, so that products already at hand give the rest without a pass over pairs:

    dc_i = q_i·F_q,i + k_i·F_k,i - k_i·B_i, and <S', dS> more for c_last, of the state S' after the chunk
    β_i dβ_i = R_i·V'_i, and the slope of β = sigmoid(b) is β (1 - β): nothing is divided by β
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lora.backend import Array, accumulation_dtype, empty, matmul, run_all, wide
from lora.backend.threads import thread_count
from lora.host.unit_lower_inverse import unit_lower_inverse
from lora.ops._logistic import sigmoid, softplus
from lora.ops.gated_delta_rule import L2_EPS, Grads, Saved, check_shapes

CHUNK = 64  # tokens
# of a chunk's largest array: calls are long beside Python's lock, arrays still in cache
TASK_ELEMENTS = 2**17


class _Task(NamedTuple):
    """What one thread computes at a time: some heads of a sequence."""

    sequence: int
    rows: slice
    keys: slice  # heads of q and k
    values: slice  # the heads of v that share them


class _Gates(NamedTuple):
    """What a and b open, [H, N]."""

    g: Array  # log of the decay
    beta: Array


class _Chunk(NamedTuple):
    """A chunk of a task in the letters of the module's equations, [G, M or 1, ..] of the task's heads."""

    rows: slice
    qk: Array  # [.., 1, 2 C, K] Q over K
    lengths: Array  # [.., 1, 2 C, 1] what the inputs were multiplied by to become them
    since_start: Array  # [.., M, C, 1] e^c
    until_end: Array  # [.., M, C, 1] e^{c_last - c}
    beta: Array  # [.., M, C, 1]
    decay: Array  # [.., M, 2 C, C] D over -diag(β) tril(D, -1)
    pairs: Array  # [.., M, 2 C, C] Q Kᵀ ∘ D over -L
    solve: Array  # [.., M, C, C] T
    met: Array | None  # [.., M, K, W] S; None for zeros
    written: Array  # [.., M, C, W] V'

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def q(self) -> Array:
        return self.qk[:, :, : self.size]

    @property
    def k(self) -> Array:
        return self.qk[:, :, self.size :]

    @property
    def scores(self) -> Array:
        """Q Kᵀ ∘ D."""
        return self.pairs[:, :, : self.size]

    @property
    def over_all(self) -> Array:
        """The decay from the start of the chunk to its end, [.., M, 1, 1]."""
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

    Arguments and errors as the reference's: `q`, `k` [N, G, K], `v` [N, H, W], `a`, `b` [N, H].
    """
    saved = Saved(q, k, v, a, b, A_log, dt_bias, cu_seqlens, initial_state)
    check_shapes(saved)
    gates, o, state = _gates(saved), empty(v.shape, v.dtype), None
    if wants_state:
        shape = (cu_seqlens.size - 1, v.shape[1], k.shape[2], v.shape[2])
        state = empty(shape, accumulation_dtype(v.dtype))

    def run(task: _Task) -> None:
        met = _state_of(initial_state, task)
        for rows in _chunks(task):
            chunk = _chunk(saved, gates, task, rows, met)
            _by_token(o, task, rows)[...] = _read(chunk)
            if state is not None or rows.stop < task.rows.stop:
                met = _made(chunk)
        if state is not None:
            state[task.sequence, task.values] = _by_head(met)

    run_all([partial(run, task) for task in _tasks(saved)])
    return (o, state), saved


def backward(saved: Saved, do: Array, dstate: Array | None = None, *, wants_decay: bool = False) -> Grads:
    """Return the gradients, given `do` [N, H, W] and `dstate` [S, H, K, W] for the state after each sequence.

    `wants_decay` asks for those of A_log and dt_bias, which are frozen under LoRA.
    """
    gates, initial = _gates(saved), saved.initial_state
    dq, dk, dv = (empty(array.shape, array.dtype) for array in saved[:3])
    dg, dbeta = (empty(array.shape, array.dtype) for array in gates)
    dinitial = empty(initial.shape, gates.g.dtype) if initial is not None else None
    grads = _TokenGrads(dq, dk, dv, dg, dbeta)

    def run(task: _Task) -> None:
        met, dmade = _state_of(initial, task), _state_of(dstate, task)
        chunks = []
        for rows in _chunks(task):
            chunks.append(_chunk(saved, gates, task, rows, met))
            if rows.stop < task.rows.stop:
                met = _made(chunks[-1])
        while chunks:
            dmade = _retreat(grads, task, chunks.pop(), do, dmade)
        if dinitial is not None:
            dinitial[task.sequence, task.values] = _by_head(dmade)

    run_all([partial(run, task) for task in _tasks(saved)])
    return _input_grads(saved, grads, gates, dinitial, wants_decay=wants_decay)


class _TokenGrads(NamedTuple):
    """Of what chunks are made of: q, k and v in their own dtypes, the gates in the accumulation dtype."""

    q: Array  # [N, G, K]
    k: Array  # [N, G, K]
    v: Array  # [N, H, W]
    g: Array  # [H, N]
    scaled_beta: Array  # [H, N] β dβ


def _tasks(saved: Saved) -> Iterator[_Task]:
    """Cut sequences and heads into tasks, the longest first: no thread is left alone with one at the end."""
    groups, width = saved.k.shape[1:]
    shared = saved.v.shape[1] // groups
    spans = list(enumerate(pairwise(saved.cu_seqlens.tolist())))
    share = -(-len(spans) * groups // thread_count())  # of a thread, where they are few
    for sequence, (start, stop) in sorted(spans, key=lambda span: span[1][0] - span[1][1]):
        step = min(share, groups_at_once(stop - start, shared, width, saved.v.shape[2]))
        for first in range(0, groups, step):
            last = min(first + step, groups)
            heads = slice(first, last), slice(first * shared, last * shared)
            yield _Task(sequence, slice(start, stop), *heads)


def groups_at_once(tokens: int, shared: int, key_width: int, value_width: int) -> int:
    """Return how many key heads, of `shared` value heads each, a task takes of so long a sequence."""
    chunk = min(tokens, CHUNK)
    widest = max(chunk * key_width, chunk * value_width, key_width * value_width)
    return max(1, TASK_ELEMENTS // (shared * widest))


def _chunks(task: _Task) -> Iterator[slice]:
    """Yield the rows of each chunk, in order of time."""
    for start in range(task.rows.start, task.rows.stop, CHUNK):
        yield slice(start, min(start + CHUNK, task.rows.stop))


def _gates(saved: Saved) -> _Gates:
    dtype = accumulation_dtype(saved.v.dtype)
    rate = -np.exp(saved.A_log.astype(dtype))
    g = rate * softplus(wide(saved.a) + saved.dt_bias.astype(dtype))
    return _Gates(*(np.ascontiguousarray(gate.T) for gate in (g, sigmoid(wide(saved.b)))))


def _of_task(gate: Array, task: _Task, rows: slice) -> Array:
    """Return a view [G, M, C, 1] of `gate` [H, N]."""
    return gate[task.values, rows].reshape(task.keys.stop - task.keys.start, -1, rows.stop - rows.start, 1)


def _by_token(values: Array, task: _Task, rows: slice) -> Array:
    """Return a view [G, M, C, W] of `values` [N, H, W]."""
    part = values[rows, task.values]
    return part.reshape(len(part), task.keys.stop - task.keys.start, -1, part.shape[2]).transpose(1, 2, 0, 3)


def _state_of(states: Array | None, task: _Task) -> Array | None:
    """Return a view [G, M, K, W] of the task's own of `states` [S, H, K, W]."""
    if states is None:
        return None
    part = states[task.sequence, task.values]
    return part.reshape(task.keys.stop - task.keys.start, -1, *part.shape[1:])


def _by_head(state: Array | None) -> Any:
    """Return a task's state [G, M, K, W] as [G M, K, W]; None stands for zeros."""
    return 0 if state is None else state.reshape(-1, *state.shape[2:])


def _chunk(saved: Saved, gates: _Gates, task: _Task, rows: slice, met: Array | None) -> _Chunk:
    qk, lengths = _unit_rows(saved, task, rows)
    g, beta = (_of_task(gate, task, rows) for gate in gates)
    size, dtype = g.shape[2], g.dtype
    k = qk[:, :, size:]
    # in float64: after one strong decay the small differences of later sums would lose their digits
    total = np.cumsum(g, axis=-2, dtype="float64")
    since_start, until_end = np.exp(total.astype(dtype)), np.exp((total[..., -1:, :] - total).astype(dtype))
    decay = _decay(total, beta)
    pairs = matmul(qk, _t(k)) * decay
    solve = unit_lower_inverse(pairs[:, :, size:])
    right = _by_token(saved.v, task, rows)
    if met is not None:
        recalled = matmul(k, met)
        recalled *= since_start
        right = np.subtract(right, recalled, out=recalled)
    written = matmul(solve, beta * right)
    return _Chunk(rows, qk, lengths, since_start, until_end, beta, decay, pairs, solve, met, written)


def _decay(total: Array, beta: Array) -> Array:
    """Return D over -diag(β) tril(D, -1) [.., 2 C, C], for c and β [.., C, 1]."""
    *stack, size, _ = total.shape
    decay = np.empty((*stack, 2 * size, size), beta.dtype)
    between, of_keys = decay[..., :size, :], decay[..., size:, :]
    # the mask comes before the exponential: above the diagonal c_i - c_j is positive and may overflow
    np.add(total - _t(total), _hidden(size), out=between, casting="same_kind")
    np.exp(between, out=between)
    np.multiply(between, -beta, out=of_keys)
    np.einsum("...ii->...i", of_keys)[...] = 0
    return decay


@cache
def _hidden(size: int) -> Array:
    """Return [C, C], -inf above the diagonal, else 0."""
    return np.where(np.tri(size, dtype=bool), 0, -np.inf)


def _unit_rows(saved: Saved, task: _Task, rows: slice) -> tuple[Array, Array]:
    """Return Q over K [G, 1, 2 C, K], and what q and k were multiplied by [G, 1, 2 C, 1]."""
    size, width = rows.stop - rows.start, saved.k.shape[2]
    shape = (task.keys.stop - task.keys.start, 1, 2 * size)
    qk = np.empty((*shape, width), accumulation_dtype(saved.v.dtype))
    lengths = np.empty((*shape, 1), qk.dtype)
    for half, x, scale in ((0, saved.q, width**-0.5), (size, saved.k, 1.0)):
        x = wide(x[rows, task.keys]).swapaxes(0, 1)
        by = lengths[:, 0, half : half + size]
        np.vecdot(x, x, out=by[..., 0])
        by += L2_EPS
        np.sqrt(by, out=by)
        np.divide(scale, by, out=by)
        np.multiply(x, by, out=qk[:, 0, half : half + size])
    return qk, lengths


def _read(chunk: _Chunk) -> Array:
    """Return O, what the chunk's queries read."""
    o = matmul(chunk.scores, chunk.written)
    if chunk.met is not None:
        of_state = matmul(chunk.q, chunk.met)
        of_state *= chunk.since_start
        o += of_state
    return o


def _made(chunk: _Chunk) -> Array:
    """Return the state after the chunk."""
    made = matmul(_t(chunk.until_end * chunk.k), chunk.written)
    if chunk.met is not None:
        made += chunk.over_all * chunk.met
    return made


def _retreat(grads: _TokenGrads, task: _Task, chunk: _Chunk, do: Array, dmade: Array | None) -> Array | None:
    """Write the gradients of a chunk's tokens; return that of the state met, given that of the one made."""
    size, k = chunk.size, chunk.k
    sides = np.empty((*chunk.written.shape[:2], 2 * size, chunk.written.shape[3]), chunk.written.dtype)
    do_now, right = sides[:, :, :size], sides[:, :, size:]
    do_now[...] = _by_token(do, task, chunk.rows)
    dwritten = matmul(_t(chunk.scores), do_now)
    if dmade is not None:
        dwritten += matmul(chunk.until_end * k, dmade)
    np.matmul(_t(chunk.solve), dwritten, out=right)
    np.multiply(right, chunk.beta, out=_by_token(grads.v, task, chunk.rows), casting="unsafe")
    _of_task(grads.scaled_beta, task, chunk.rows)[...] = _dot(right, chunk.written)

    pairs = matmul(sides, _t(chunk.written))
    pairs *= chunk.decay
    as_later, as_earlier, dmet = matmul(pairs, k), matmul(_t(pairs), chunk.qk), None
    if chunk.met is not None:
        sides *= np.concatenate([chunk.since_start, -chunk.beta * chunk.since_start], axis=2)
        as_later += matmul(sides, _t(chunk.met))
        dmet = matmul(_t(chunk.qk), sides)
    along, back = _dot(chunk.qk, as_later), _dot(k, as_earlier)
    dc = along[:, :, :size] + along[:, :, size:] - back
    if dmade is not None:
        kept = matmul(chunk.written, _t(dmade))
        kept *= chunk.until_end
        as_earlier += kept
        kept_along = _dot(k, kept)
        dc -= kept_along
        back += kept_along
        dc[:, :, -1:] += kept_along.sum(axis=2, keepdims=True)
        if chunk.met is not None:
            dc[:, :, -1:] += chunk.over_all * _dot(chunk.met, dmade).sum(axis=2, keepdims=True)
            dmet += chunk.over_all * dmade
    _of_task(grads.g, task, chunk.rows)[...] = dc[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
    as_later[:, :, size:] += as_earlier
    along[:, :, size:] += back
    _through_unit(grads, task, chunk, _over_heads(as_later), _over_heads(along))
    return dmet


def _over_heads(share: Array) -> Array:
    """Return the sum [G, ..] of what the value heads [G, M, ..] of one key head give it; may be a view."""
    return share[:, 0] if share.shape[1] == 1 else share.sum(axis=1)


def _through_unit(grads: _TokenGrads, task: _Task, chunk: _Chunk, dqk: Array, along: Array) -> None:
    """Write the gradients of q and k, given those of Q over K [G, 2 C, K] and their products with it.

    What would only lengthen a row drops out.
    """
    size, lengths = chunk.size, chunk.lengths[:, 0]
    along[:, :size] *= dqk.shape[2]  # a row of Q has the length K^-0.5, one of K has 1
    dqk -= chunk.qk[:, 0] * along
    for half, out in ((slice(size), grads.q), (slice(size, 2 * size), grads.k)):
        out_now = out[chunk.rows, task.keys].swapaxes(0, 1)
        np.multiply(dqk[:, half], lengths[:, half], out=out_now, casting="unsafe")


def _input_grads(
    saved: Saved, grads: _TokenGrads, gates: _Gates, dinitial: Array | None, *, wants_decay: bool
) -> Grads:
    rate = -np.exp(saved.A_log.astype(gates.g.dtype))
    slope = sigmoid(wide(saved.a) + saved.dt_bias.astype(gates.g.dtype))
    da = grads.g.T * rate * slope
    return Grads(
        q=grads.q,
        k=grads.k,
        v=grads.v,
        a=da.astype(saved.a.dtype, copy=False),
        b=(grads.scaled_beta * (1 - gates.beta)).T.astype(saved.b.dtype),
        A_log=(grads.g * gates.g).sum(axis=1) if wants_decay else None,
        dt_bias=da.sum(axis=0) if wants_decay else None,
        initial_state=dinitial,
    )


def _dot(x: Array, y: Array) -> Array:
    """Return Σ_w x_w y_w over the last axis, which is kept."""
    return np.vecdot(x, y)[..., None]


def _t(matrices: Array) -> Array:
    return matrices.swapaxes(-1, -2)
