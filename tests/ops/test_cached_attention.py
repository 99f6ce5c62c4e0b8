"""Attempts to falsify contracts/ops/cached_attention.yaml."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.cached_attention
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError, UnsupportedError
from lora.ops import attention, cached_attention
from tests.harness.agreement import assert_agrees
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted, schedules
from tests.harness.implementations import Emulated, implementations, tried
from tests.ops.observe import assert_refused

CONTRACT = op_contract("cached_attention")
IMPLEMENTATIONS = [cached_attention]
_, *KERNELS = implementations(cached_attention)
SCALE = 0.37


class Case(NamedTuple):
    s: int
    c: int
    g: int
    m: int
    e: int
    seed: int

    def arrays(self, dtype: Any = "float64") -> tuple[Any, Any, Any, Any]:
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(1, self.c + 1, self.s)
        keys, values = rng.standard_normal((2, self.s, self.c, self.g, self.e)).astype(dtype)
        return rng.standard_normal((self.s, self.g * self.m, self.e)).astype(dtype), keys, values, lengths


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "SCGME"), seeds)
KERNEL_CASES = st.builds(
    Case,
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 127, 128, 129)), st.integers(1, 300)),
    st.integers(1, 2),
    st.integers(1, 9),
    st.sampled_from((64, 128, 256)),
    seeds,
)


def check_last_row(op: Any, case: Case) -> None:
    q, keys, values, lengths = case.arrays()
    o = op.forward(q, keys, values, lengths, scale=SCALE)
    for row, length in enumerate(lengths):
        queries = np.concatenate([np.zeros((length - 1, *q.shape[1:])), q[row : row + 1]])
        whole = attention.forward(
            queries, keys[row, :length], values[row, :length], np.array([0, length]), scale=SCALE
        )[0]
        assert relative(o[row], whole[-1]) < 1e-12


def check_nothing_behind_is_read(op: Any, case: Case) -> None:
    q, keys, values, lengths = case.arrays()
    first = op.forward(q, keys, values, lengths, scale=SCALE)
    for row, length in enumerate(lengths):
        keys[row, length:], values[row, length:] = np.nan, np.nan
    np.testing.assert_array_equal(op.forward(q, keys, values, lengths, scale=SCALE), first)


def check_agreement(op: Any, case: Case) -> None:
    q, keys, values, lengths = case.arrays(bfloat16)
    for row, length in enumerate(lengths):
        keys[row, length:], values[row, length:] = np.nan, np.nan
    wide = (array.astype("float64") for array in (q, keys, values))
    o = op.forward(q, keys, values, lengths, scale=SCALE)
    assert_agrees(o, cached_attention.forward(*wide, lengths, scale=SCALE), "o")


def check_refusals(op: Any, case: Case) -> None:
    q, keys, values, lengths = case._replace(c=3).arrays(bfloat16)
    unsupported = [
        (q.astype("float32"), keys, values, lengths),
        (q, keys, values.astype("float32"), lengths),
        (q[..., :48], keys[..., :48], values[..., :48], lengths),
    ]
    misfits = [
        (q[..., :-1], keys, values, lengths),
        (q, keys[:, :-1], values, lengths),
        (q, keys, values, lengths[:-1]),
        (np.repeat(q, 2, axis=1)[:, 1:], np.repeat(keys, 2, axis=2), np.repeat(values, 2, axis=2), lengths),
    ]
    for arrays in unsupported:
        assert_refused(
            UnsupportedError, "cached_attention on a GPU", partial(op.forward, *arrays, scale=SCALE)
        )
    for arrays in misfits:
        assert_refused(ShapeError, "expected q [S, H, E]", partial(op.forward, *arrays, scale=SCALE))


CHECKS = {"CACHED-001": check_last_row, "CACHED-002": check_nothing_behind_is_read}
KERNEL_CHECKS = {"CACHED-003": check_agreement, "CACHED-004": check_refusals}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


@pytest.mark.parametrize(("check", "op"), tried(KERNEL_CHECKS, KERNELS))
@given(case=KERNEL_CASES, schedule=schedules)
def test_kernel_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(change: Any) -> SimpleNamespace:
    def forward(q: Any, keys: Any, values: Any, lengths: Any, *, scale: float) -> Any:
        return cached_attention.forward(*change(q, keys, values, lengths), scale=scale)

    return SimpleNamespace(forward=forward)


MUTANTS = {
    "wrong_group": _bug(lambda q, k, v, n: (q, k[:, :, ::-1], v, n)),
    "forgets_the_scale": _bug(lambda q, k, v, n: (q / SCALE, k, v, n)),
    "misses_the_newest_token": _bug(lambda q, k, v, n: (q, k, v, np.maximum(1, n - 1))),
    "reads_the_whole_cache": _bug(lambda q, k, v, n: (q, k, v, np.full(len(n), k.shape[1]))),
}


def _kernel_bug(old: str, new: str) -> Emulated:
    return Emulated(lora.cuda.cached_attention, ("cached_attention.cu", old, new))


def _rounding(q: Any, keys: Any, values: Any, lengths: Any, *, scale: float) -> Any:
    rounded = (x.astype(bfloat16) for x in (q, keys, values))
    return lora.cuda.cached_attention.forward(*rounded, lengths, scale=scale)


KERNEL_MUTANTS = {
    "kernel_reads_the_whole_cache": _kernel_bug("kept[a] = token < length;", "kept[a] = token < C;"),
    "kernel_of_the_wrong_group": _kernel_bug("stride * C) + group * E", "stride * C) + (G - 1 - group) * E"),
    "no_barrier_between_heads": _kernel_bug("__syncthreads();  // the partials", "// the partials"),
    "forgets_a_warp": _kernel_bug("other < WARPS;", "other < WARPS - 1;"),
    "merges_without_rescaling": _kernel_bug("into.sum[i] * keep", "into.sum[i]"),
    "stores_heads_of_the_next_group": _kernel_bug("if (h < heads && warp == 0", "if (warp == 0"),
    "rounds_in_silence": SimpleNamespace(forward=_rounding),
}
ALL_MUTANTS = MUTANTS | KERNEL_MUTANTS


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS | KERNEL_CHECKS, ALL_MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    in_kernel = mutant in KERNEL_MUTANTS.values()
    assert_killed(check, mutant, KERNEL_CASES if in_kernel else CASES)
