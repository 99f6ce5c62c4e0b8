"""Attempts to falsify contracts/ops/embedding.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.embedding
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import DataError
from lora.ops import embedding
from lora.ops.embedding import Grads
from tests.harness.agreement import assert_agrees, widened
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_refused, assert_unchanged

CONTRACT = op_contract("embedding")
IMPLEMENTATIONS = implementations(embedding)


class Case(NamedTuple):
    n: int
    v: int
    d: int
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return rng.integers(0, self.v, self.n), textured(rng, (self.v, self.d), self.texture, dtype)


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "NVD"), textures, seeds)


def check_forward(op: Any, case: Case) -> None:
    for stored, asked in (("float32", "float32"), (bfloat16, "float32"), (bfloat16, bfloat16)):
        ids, table = case.arrays(stored)
        x, _ = op.forward(ids, table, dtype=asked)
        assert x.dtype == asked
        expected = np.array([[float(table[i, d]) for d in range(case.d)] for i in ids])
        np.testing.assert_array_equal(x.astype("float64"), expected)


@in_float64
def check_gradient(op: Any, case: Case) -> None:
    # the difference of two outputs of ten thousand has lost the digits that it is judged by
    case = case._replace(texture="normal") if case.texture == "large" else case
    ids, table = case.arrays("float64")
    rng = np.random.default_rng(case.seed + 1)
    dx = rng.standard_normal((case.n, case.d))
    grads = op.backward(op.forward(ids, table, dtype="float64")[1], dx)

    def forward(table: Any) -> Any:
        return op.forward(ids, table, dtype="float64")[0]

    assert_gradients(forward, {"table": table}, (dx,), grads._asdict(), rng)


def check_sums_wide(op: Any, case: Case) -> None:
    ids, table = np.full(1000, case.v - 1), case.arrays(bfloat16)[1]
    _, saved = op.forward(ids, table, dtype=bfloat16)
    dtable = op.backward(saved, np.ones((1000, case.d), bfloat16)).table
    assert dtable.dtype == "float32"
    assert (dtable[-1] == 1000).all()
    assert (dtable[:-1] == 0).all()


def check_refuses_foreign_ids(op: Any, case: Case) -> None:
    ids, table = case.arrays("float32")
    for foreign in (-1, -case.v, case.v, case.v + 7):
        ids[case.n // 2] = foreign
        assert_refused(DataError, str(foreign), lambda: op.forward(ids, table, dtype="float32"))


def check_inputs_unchanged(op: Any, case: Case) -> None:
    ids, table = case.arrays("float32")
    dx = np.ones((case.n, case.d), "float32")

    def run() -> None:
        x, saved = op.forward(ids, table, dtype="float32")
        op.backward(saved, dx)
        x += 1  # x must be the caller's own, no view of the table

    assert_unchanged({"ids": ids, "table": table, "dx": dx}, run)


def check_agreement(op: Any, case: Case) -> None:
    case = case._replace(d=8 * case.d) if case.seed % 2 else case
    for dtype in (bfloat16, "float32"):
        ids, table = case.arrays(dtype)
        dx = np.random.default_rng(case.seed + 1).standard_normal((case.n, case.d)).astype(dtype)
        x, saved = op.forward(ids, table, dtype=dtype)
        np.testing.assert_array_equal(x.astype("float64"), table[ids].astype("float64"))
        exact = embedding.backward(saved._replace(ids=ids), widened({"dx": dx})["dx"]).table
        assert_agrees(op.backward(saved, dx).table, exact, "dtable")


CHECKS = {
    "EMBEDDING-001": check_forward,
    "EMBEDDING-002": check_gradient,
    "EMBEDDING-003": check_sums_wide,
    "EMBEDDING-004": check_refuses_foreign_ids,
    "EMBEDDING-005": check_inputs_unchanged,
    "EMBEDDING-006": check_agreement,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": embedding.forward, "backward": embedding.backward} | changes)


def _unchecked(change: Any) -> SimpleNamespace:
    return _bug(forward=lambda ids, table, *, dtype: (table[change(ids, len(table))].astype(dtype), None))


def _last_row_wins(saved: Any, dx: Any) -> Grads:
    dtable = np.zeros(saved.table_shape)
    dtable[saved.ids] = dx
    return Grads(dtable)


def _shared(saved: Any, dx: Any) -> Grads:
    repeats = np.bincount(saved.ids, minlength=saved.table_shape[0])
    return Grads(embedding.backward(saved, dx).table / np.maximum(repeats, 1)[:, None])


def _summed_in_storage(saved: Any, dx: Any) -> Grads:
    dtable = np.zeros(saved.table_shape, dx.dtype)
    for i, row in zip(saved.ids, dx, strict=True):
        dtable[i] += row
    return Grads(dtable.astype("float32"))


def _zeroing(ids: Any, table: Any, *, dtype: Any) -> Any:
    table[0] = 0
    return embedding.forward(ids, table, dtype=dtype)


MUTANTS = {
    "reads_the_next_row": _unchecked(lambda ids, rows: (ids + 1) % rows),
    "reads_in_sorted_order": _unchecked(lambda ids, rows: np.sort(ids)),
    "last_row_wins": _bug(backward=_last_row_wins),
    "shares_among_repeats": _bug(backward=_shared),
    "sums_in_storage": _bug(backward=_summed_in_storage),
    "wraps_negative_ids": _unchecked(lambda ids, rows: ids),
    "clips_large_ids": _unchecked(lambda ids, rows: np.clip(ids, 0, rows - 1)),
    "zeroes_the_first_row": _bug(forward=_zeroing),
    "stores_past_the_end": Emulated(lora.cuda.embedding, ("pack.cuh", "if (column + i < width) row", "row")),
    "takes_a_part_for_a_pack": Emulated(lora.cuda.embedding, ("pack.cuh", " && width % N == 0", "")),
    "every_token_writes": Emulated(
        lora.cuda.embedding,
        ("embedding.cu", "if (__syncthreads_or(earlier)) return;", "__syncthreads_or(earlier);"),
    ),
    "divergent_return": Emulated(
        lora.cuda.embedding,
        (
            "embedding.cu",
            "    const long long id =",
            "    if (column >= D) return;\n    const long long id =",
        ),
    ),
    "stops_at_the_last_token": Emulated(
        lora.cuda.embedding,
        ("embedding.cu", "static_cast<int>(blockDim.x), N)", "static_cast<int>(blockDim.x), N - 1)"),
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
