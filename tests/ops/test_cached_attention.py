"""Attempts to falsify contracts/ops/cached_attention.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import op_contract
from lora.ops import attention, cached_attention
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = op_contract("cached_attention")
IMPLEMENTATIONS = [cached_attention]
SCALE = 0.37


class Case(NamedTuple):
    s: int
    c: int
    g: int
    m: int
    e: int
    seed: int

    def arrays(self) -> tuple[Any, Any, Any, Any]:
        rng = np.random.default_rng(self.seed)
        lengths = rng.integers(1, self.c + 1, self.s)
        keys, values = rng.standard_normal((2, self.s, self.c, self.g, self.e))
        return rng.standard_normal((self.s, self.g * self.m, self.e)), keys, values, lengths


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "SCGME"), seeds)


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


CHECKS = {"CACHED-001": check_last_row, "CACHED-002": check_nothing_behind_is_read}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


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


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
