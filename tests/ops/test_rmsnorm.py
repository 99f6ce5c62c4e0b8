"""Attempts to falsify contracts/ops/rmsnorm.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.rmsnorm
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.ops import rmsnorm
from lora.ops.rmsnorm import Grads
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures, widths
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried

CONTRACT = op_contract("rmsnorm")
IMPLEMENTATIONS = implementations(rmsnorm)
EPS = 1e-6


class Case(NamedTuple):
    n: int
    d: int
    texture: str
    zero_centred: bool
    seed: int

    def arrays(self, dtype: str) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        x = textured(rng, (self.n, self.d), self.texture, dtype)
        weight, residual = rng.standard_normal(self.d), rng.standard_normal((self.n, self.d))
        return {"x": x, "weight": weight.astype(dtype), "residual": residual.astype(dtype)}


CASES = st.builds(
    Case,
    st.integers(*CONTRACT.domain["N"]),
    widths(*CONTRACT.domain["D"]),
    textures,
    st.booleans(),
    seeds,
)


@in_float64
def check_gradients(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float64")
    rng = np.random.default_rng(case.seed + 1)
    dy, dstream = (rng.standard_normal((case.n, case.d)) for _ in range(2))

    def forward(**inputs: Any) -> Any:
        # eps well above zero: at D = 1 the norm is a step function, which no difference can follow
        return op.forward(**inputs, eps=0.5, zero_centred=case.zero_centred)[0]

    saved = op.forward(**arrays, eps=0.5, zero_centred=case.zero_centred)[1]
    grads = op.backward(saved, dy, dstream, wants_weight=True)
    found = {"x": grads.x, "residual": grads.x, "weight": grads.weight}
    assert_gradients(forward, arrays, (dy, dstream), found, rng)


def check_scaling_changes_no_bit(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float32")
    scaled = {**arrays, "x": 8 * arrays["x"], "residual": 8 * arrays["residual"]}
    y, y_scaled = (op.forward(**a, eps=0.0, zero_centred=case.zero_centred)[0][0] for a in (arrays, scaled))
    np.testing.assert_array_equal(y_scaled, y)


def check_forward(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    (y, stream), _ = op.forward(**arrays, eps=EPS, zero_centred=case.zero_centred)
    np.testing.assert_array_equal(stream, arrays["x"] + arrays["residual"])
    exact = stream.astype("float64")
    scale = arrays["weight"].astype("float64") + case.zero_centred
    exact = exact * scale / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + EPS)
    assert_within(y, exact, exact, case.d + 8, "float32")


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    before = {name: array.copy() for name, array in arrays.items()}
    _, saved = op.forward(**arrays, eps=EPS, zero_centred=case.zero_centred)
    dy, dstream = np.ones((2, case.n, case.d), "float32")
    op.backward(saved, dy, dstream)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert (dy == 1).all()
    assert (dstream == 1).all()


def check_agreement(op: Any, case: Case) -> None:
    rng, how = np.random.default_rng(case.seed + 1), {"eps": EPS, "zero_centred": case.zero_centred}
    dtypes = rng.permutation(["bfloat16", "float32"])
    dtype, stored = (
        bfloat16 if name == "bfloat16" else np.dtype(name) for name in dtypes[[0, rng.integers(2)]]
    )
    arrays = case.arrays(dtype)
    arrays["weight"] = arrays["weight"].astype(stored)
    if rng.integers(2):
        arrays["residual"] = None
    dy, dstream = (rng.standard_normal((case.n, case.d)).astype(dtype) for _ in range(2))
    (y, stream), saved = op.forward(**arrays, **how)
    grads = op.backward(saved, dy, dstream, wants_weight=True)
    exact = widened(arrays)
    (y_exact, stream_exact), saved_exact = rmsnorm.forward(**exact, **how)
    # the gradients are judged at the stream that was stored: rounding moves that first
    at_stored = saved_exact._replace(stream=np.asarray(stream, "float64"))
    rows = (at_stored.stream**2).mean(axis=-1, keepdims=True) + EPS
    at_stored = at_stored._replace(rstd=1 / np.sqrt(rows))
    grads_exact = rmsnorm.backward(
        at_stored, dy.astype("float64"), dstream.astype("float64"), wants_weight=True
    )
    scale = exact["weight"] + case.zero_centred
    assert_agrees(y, y_exact, "y")
    assert_agrees(stream, stream_exact, "stream")
    assert_agrees(grads.x, grads_exact.x, "dx", terms=abs(at_stored.rstd * dy.astype("float64") * scale) + 1)
    assert_agrees(grads.weight, grads_exact.weight, "dweight")


CHECKS = {
    "RMSNORM-001": check_gradients,
    "RMSNORM-002": check_scaling_changes_no_bit,
    "RMSNORM-003": check_forward,
    "RMSNORM-004": check_inputs_unchanged,
    "RMSNORM-005": check_agreement,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": rmsnorm.forward, "backward": rmsnorm.backward} | changes)


def _kernel_bug(file: str, old: str, new: str) -> Emulated:
    return Emulated(lora.cuda.rmsnorm, (file, old, new))


def _without_projection(saved: Any, dy: Any, dstream: Any, wants_weight: bool = False) -> Grads:
    right = rmsnorm.backward(saved, dy, dstream, wants_weight=wants_weight)
    return right._replace(x=saved.rstd * dy * (saved.weight + saved.zero_centred) + dstream)


def _without_root(x: Any, weight: Any, residual: Any, *, eps: float, zero_centred: bool) -> Any:
    (y, stream), saved = rmsnorm.forward(x, weight, residual, eps=eps, zero_centred=zero_centred)
    return (y * saved.rstd, stream), saved


def _in_place(x: Any, weight: Any, residual: Any, *, eps: float, zero_centred: bool) -> Any:
    residual += x
    return rmsnorm.forward(residual, weight, eps=eps, zero_centred=zero_centred)


MUTANTS = {
    "misses_the_projection": _bug(backward=_without_projection),
    "ignores_the_weight": _bug(
        backward=lambda s, *a, **k: rmsnorm.backward(s._replace(weight=s.weight**0), *a, **k)
    ),
    "drops_the_residual_gradient": _bug(backward=lambda s, dy, dstream, **k: rmsnorm.backward(s, dy, **k)),
    "forgets_the_root": _bug(forward=_without_root),
    "subtracts_the_mean": _bug(
        forward=lambda x, weight, residual, **k: rmsnorm.forward(
            x - (x + residual).mean(-1, keepdims=True), weight, residual, **k
        )
    ),
    "plain_norm_for_zero_centred": _bug(
        forward=lambda x, weight, residual, *, eps, zero_centred: rmsnorm.forward(
            x, weight, residual, eps=eps
        )
    ),
    "adds_in_place": _bug(forward=_in_place),
    "no_barrier_in_the_sum": _kernel_bug(
        "reduce.cuh", "    __syncthreads();\n    float sum", "    float sum"
    ),
    "half_a_warp_in_the_sum": _kernel_bug(
        "reduce.cuh", "__shfl_xor_sync(WHOLE_WARP", "__shfl_xor_sync(0x0000ffffu"
    ),
    "shuffles_too_near": _kernel_bug("reduce.cuh", "step = WARP / 2", "step = WARP / 4"),
    "stores_past_the_row": _kernel_bug("pack.cuh", "if (column + i < width) row", "row"),
    "reads_past_the_row": _kernel_bug(
        "pack.cuh", "column + i < width ? widened(row[column + i]) : 0.0f", "widened(row[column + i])"
    ),
    "forgets_eps": _kernel_bug("rmsnorm.cu", " / D + eps)", " / D)"),
    "scale_of_the_wrong_form": _kernel_bug(
        "rmsnorm.cu", "zero_centred ? 1.0f : 0.0f", "zero_centred ? 0.0f : 1.0f"
    ),
    "rstd_of_another_row": _kernel_bug("rmsnorm.cu", "rstd = rstd_N[blockIdx.x]", "rstd = rstd_N[0]"),
    "chunks_leave_a_row_out": _kernel_bug("rmsnorm.cu", "min(first + rows, N)", "min(first + rows - 1, N)"),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
