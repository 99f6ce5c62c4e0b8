"""The gated delta rule by its definition, a token at a time, forward and backward, in float64: the oracle.

Every step is one line of the recurrence; nothing here is shared with the chunked operation. `bug` plants one
of the mistakes that the contract names.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """One token of all value heads."""

    decayed: np.ndarray  # [H, K, W] the state that is corrected
    miss: np.ndarray  # [H, W] what the value has over what the key recalls
    after: np.ndarray  # [H, K, W]


class Gates(NamedTuple):
    """What the recurrence runs on, one row a token, one entry or vector a value head."""

    q: np.ndarray  # [N, H, K]
    k: np.ndarray  # [N, H, K]
    g: np.ndarray  # [N, H]
    beta: np.ndarray  # [N, H]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def gates(arrays: dict[str, Any], bug: str = "") -> Gates:
    q, k, a, b = (arrays[name].astype("float64") for name in "qkab")
    heads, groups = arrays["v"].shape[1], k.shape[1]
    shares = (
        np.arange(heads) % groups if bug == "interleaves_the_heads" else np.arange(heads) // (heads // groups)
    )
    if bug != "misses_the_l2_norm":
        q, k = unit(q), unit(k)
    q = q * (1 if bug == "forgets_the_query_scale" else k.shape[2] ** -0.5)
    x = a + arrays["dt_bias"]
    softplus = np.maximum(x, 0) if bug == "rectifies_the_decay" else np.logaddexp(0, x)
    return Gates(q[:, shares], k[:, shares], -np.exp(arrays["A_log"]) * softplus, logistic(b))


def forward(arrays: dict[str, Any], bug: str = "") -> tuple[np.ndarray, np.ndarray, list[Step]]:
    """Return o [N, H, W], the state after each sequence [S, H, K, W], and a record of every token."""
    q, k, g, beta = gates(arrays, bug)
    v, bounds, initial = arrays["v"].astype("float64"), arrays["cu_seqlens"], arrays["initial_state"]
    o, states, steps = np.empty(v.shape), [], []
    state = np.zeros((v.shape[1], k.shape[2], v.shape[2]))
    for s, (start, stop) in enumerate(pairwise(bounds)):
        if bug != "leaks_the_state" or s == 0:
            state = np.zeros_like(state)
        if initial is not None and bug != "drops_the_initial_state":
            state = initial[s].astype("float64")
        for n in range(start, stop):
            decay, key = np.exp(g[n])[:, None, None], k[n][:, :, None]
            decayed = decay * state
            recalled = state if bug == "decays_after_the_read" else decayed
            miss = v[n] - (0 if bug == "adds_without_correcting" else (recalled * key).sum(1))
            after = decayed + key * (beta[n][:, None] * miss)[:, None, :]
            o[n] = ((decayed if bug == "reads_before_the_write" else after) * q[n][:, :, None]).sum(1)
            steps.append(Step(decayed, miss, after))
            state = after
        states.append(state)
    return o, np.array(states), steps


def backward(arrays: dict[str, Any], do: np.ndarray, dstates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradients of ⟨do, o⟩ + ⟨dstates, states⟩ for every array of the call."""
    q, k, g, beta = gates(arrays)
    _, _, steps = forward(arrays)
    dq, dk, dg, dbeta = (np.empty_like(array) for array in (q, k, g, beta))
    dv, dinitial = np.empty(do.shape), np.empty(dstates.shape)
    for s, (start, stop) in enumerate(pairwise(arrays["cu_seqlens"])):
        dstate = dstates[s]
        for n in reversed(range(start, stop)):
            decayed, miss, after = steps[n]
            key, query = k[n][:, :, None], q[n][:, :, None]
            dq[n] = (after * do[n][:, None]).sum(2)
            dstate = dstate + query * do[n][:, None]
            written, dwritten = beta[n][:, None] * miss, (dstate * key).sum(1)
            dbeta[n], dv[n] = (dwritten * miss).sum(1), beta[n][:, None] * dwritten
            dk[n] = (dstate * written[:, None]).sum(2) - (decayed * dv[n][:, None]).sum(2)
            ddecayed = dstate - key * dv[n][:, None]
            dg[n] = (ddecayed * decayed).sum((1, 2))
            dstate = np.exp(g[n])[:, None, None] * ddecayed
        dinitial[s] = dstate
    return _through_gates(arrays, Gates(dq, dk, dg, dbeta)) | {"v": dv, "initial_state": dinitial}


def _through_gates(arrays: dict[str, Any], d: Gates) -> dict[str, np.ndarray]:
    rows, groups, width = arrays["k"].shape
    rate, x = -np.exp(arrays["A_log"]), arrays["a"] + arrays["dt_bias"]
    beta, grads = logistic(arrays["b"]), {}
    for name, dunit in (("q", d.q * width**-0.5), ("k", d.k)):
        raw = arrays[name]
        length = np.sqrt((raw**2).sum(-1, keepdims=True) + 1e-6)
        dy = dunit.reshape(rows, groups, -1, width).sum(2)
        grads[name] = dy / length - raw * (raw * dy).sum(-1, keepdims=True) / length**3
    da = d.g * rate * logistic(x)
    return grads | {
        "a": da,
        "b": d.beta * beta * (1 - beta),
        "A_log": (d.g * rate * np.logaddexp(0, x)).sum(0),
        "dt_bias": da.sum(0),
    }
