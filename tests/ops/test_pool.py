"""Attempts to falsify contracts/ops/pool.yaml."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.pool
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError, UsageError
from lora.ops import pool
from lora.ops.pool import Grads
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_refused, assert_unchanged, random_boundaries

CONTRACT = op_contract("pool")
IMPLEMENTATIONS = implementations(pool)


class Case(NamedTuple):
    s: int
    t: int
    d: int
    kind: Any
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        cu_seqlens = random_boundaries(rng, self.s, self.t)
        return textured(rng, (int(cu_seqlens[-1]), self.d), self.texture, dtype), cu_seqlens


CASES = st.builds(
    Case,
    *(st.integers(*CONTRACT.domain[axis]) for axis in "STD"),
    st.sampled_from(("mean", "last")),
    textures,
    seeds,
)


@in_float64
def check_gradient(op: Any, case: Case) -> None:
    # the difference of two outputs of ten thousand has lost the digits that it is judged by
    case = case._replace(texture="normal") if case.texture == "large" else case
    x, cu_seqlens = case.arrays("float64")
    rng = np.random.default_rng(case.seed + 1)
    dpooled = rng.standard_normal((case.s, case.d))
    grads = op.backward(op.forward(x, cu_seqlens, kind=case.kind)[1], dpooled)

    def forward(x: Any) -> Any:
        return op.forward(x, cu_seqlens, kind=case.kind)[0]

    assert_gradients(forward, {"x": x}, (dpooled,), grads._asdict(), rng)


def check_forward(op: Any, case: Case) -> None:
    for dtype, roundings in (("float32", case.t + 2), (bfloat16, 2)):
        x, cu_seqlens = case.arrays(dtype)
        pooled, _ = op.forward(x, cu_seqlens, kind=case.kind)
        assert pooled.dtype == dtype
        rows = [x[a:b].astype("float64") for a, b in pairwise(cu_seqlens)]
        if case.kind == "last":
            np.testing.assert_array_equal(pooled.astype("float64"), [r[-1] for r in rows])
        else:
            exact, magnitude = (np.array([f(r).mean(0) for r in rows]) for f in (np.array, np.abs))
            assert_within(pooled, exact, magnitude, roundings, dtype)


def check_packed_equals_alone(op: Any, case: Case) -> None:
    x, cu_seqlens = case.arrays("float32")
    packed, _ = op.forward(x, cu_seqlens, kind=case.kind)
    for s, (a, b) in enumerate(pairwise(cu_seqlens)):
        alone, _ = op.forward(x[a:b], np.array([0, b - a]), kind=case.kind)
        np.testing.assert_array_equal(packed[s], alone[0])


def check_refusals(op: Any, case: Case) -> None:
    x, cu_seqlens = case.arrays("float32")
    emptied = np.concatenate([cu_seqlens[: case.s], [cu_seqlens[case.s - 1], cu_seqlens[-1]]])
    assert_refused(ShapeError, f"{case.s - 1} has none", lambda: op.forward(x, emptied, kind=case.kind))
    assert_refused(UsageError, "'max'", lambda: op.forward(x, cu_seqlens, kind="max"))


def check_inputs_unchanged(op: Any, case: Case) -> None:
    x, cu_seqlens = case.arrays("float32")
    dpooled = np.ones((case.s, case.d), "float32")

    def run() -> None:
        pooled, saved = op.forward(x, cu_seqlens, kind=case.kind)
        op.backward(saved, dpooled)
        pooled += 1  # pooled must be the caller's own, no view of x

    assert_unchanged({"x": x, "cu_seqlens": cu_seqlens, "dpooled": dpooled}, run)


def check_agreement(op: Any, case: Case) -> None:
    for dtype in (bfloat16, "float32"):
        x, cu_seqlens = case.arrays(dtype)
        dpooled = np.random.default_rng(case.seed + 1).standard_normal((case.s, case.d)).astype(dtype)
        exact = widened({"x": x, "dpooled": dpooled})
        pooled, saved = op.forward(x, cu_seqlens, kind=case.kind)
        pooled_exact, saved_exact = pool.forward(exact["x"], cu_seqlens, kind=case.kind)
        terms = np.add.reduceat(abs(exact["x"]), cu_seqlens[:-1], axis=0) / np.diff(cu_seqlens)[:, None]
        assert_agrees(pooled, pooled_exact, "pooled", terms=terms if case.kind == "mean" else None)
        assert_agrees(op.backward(saved, dpooled).x, pool.backward(saved_exact, exact["dpooled"]).x, "dx")


CHECKS = {
    "POOL-001": check_gradient,
    "POOL-002": check_forward,
    "POOL-003": check_packed_equals_alone,
    "POOL-004": check_refusals,
    "POOL-005": check_inputs_unchanged,
    "POOL-006": check_agreement,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": pool.forward, "backward": pool.backward} | changes)


def _lengths(cu_seqlens: Any) -> Any:
    return np.diff(cu_seqlens)[:, None]


def _by_longest(x: Any, cu_seqlens: Any, *, kind: Any) -> Any:
    pooled, saved = pool.forward(x, cu_seqlens, kind=kind)
    lengths = _lengths(cu_seqlens)
    return (pooled * (lengths / lengths.max() if kind == "mean" else 1)).astype(x.dtype), saved


def _first_for_last(x: Any, cu_seqlens: Any, *, kind: Any) -> Any:
    pooled, saved = pool.forward(x, cu_seqlens, kind=kind)
    return (x[cu_seqlens[:-1]] if kind == "last" else pooled), saved


def _leaking(x: Any, cu_seqlens: Any, *, kind: Any) -> Any:
    pooled, saved = pool.forward(x, cu_seqlens, kind=kind)
    pooled[1:] += pooled[:-1] / 1000
    return pooled, saved


def _pooling_nothing(x: Any, cu_seqlens: Any, *, kind: Any) -> Any:
    sums = [x[a:b].sum(0) for a, b in pairwise(cu_seqlens)]
    return np.array(sums) / np.maximum(_lengths(cu_seqlens), 1), None


def _in_place(x: Any, cu_seqlens: Any, *, kind: Any) -> Any:
    pooled, saved = pool.forward(x, cu_seqlens, kind=kind)
    x[cu_seqlens[:-1]] = pooled + 1
    return pooled, saved


MUTANTS = {
    "forgets_the_length": _bug(backward=lambda s, d: Grads(pool.backward(s, d * _lengths(s.cu_seqlens)).x)),
    "spreads_over_the_batch": _bug(
        backward=lambda s, d: Grads(np.broadcast_to(d.mean(0), (s.cu_seqlens[-1], d.shape[1])))
    ),
    "last_gradient_everywhere": _bug(backward=lambda s, d: pool.backward(s._replace(kind="mean"), d)),
    "divides_by_the_longest": _bug(forward=_by_longest),
    "first_for_last": _bug(forward=_first_for_last),
    "leaks_over_a_boundary": _bug(forward=_leaking),
    "pools_nothing": _bug(forward=_pooling_nothing),
    "sums_in_place": _bug(forward=_in_place),
    "stores_one_column_on": Emulated(
        lora.cuda.pool,
        ("pool.cu", "D + column] = narrowed<T>(sum", "D + column + 1] = narrowed<T>(sum"),
    ),
    "starts_one_token_late": Emulated(
        lora.cuda.pool, ("pool.cu", "n = mean ? first : end - 1", "n = mean ? first + 1 : end - 1")
    ),
    "gradient_to_the_first_token": Emulated(
        lora.cuda.pool, ("pool.cu", "!mean && n == end - 1", "!mean && n == first")
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
