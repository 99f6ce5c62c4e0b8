"""Attempts to falsify contracts/ops/swiglu.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.swiglu
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.ops import swiglu
from lora.ops.swiglu import Grads
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import assert_within, gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_unchanged

CONTRACT = op_contract("swiglu")
IMPLEMENTATIONS = implementations(swiglu)
SMALLEST = float(np.finfo("float32").tiny)


class Case(NamedTuple):
    n: int
    f: int
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        return {name: textured(rng, (self.n, self.f), self.texture, dtype) for name in ("gate", "up")}


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "NF"), textures, seeds)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function in float64, by the form that overflows for neither sign."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@in_float64
def check_gradients(op: Any, case: Case) -> None:
    # at gates of ten thousand silu is a kink, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays, rng = case.arrays("float64"), np.random.default_rng(case.seed + 1)
    dy = rng.standard_normal((case.n, case.f))
    grads = op.backward(op.forward(**arrays)[1], dy)
    assert_gradients(lambda **inputs: op.forward(**inputs)[0], arrays, (dy,), grads._asdict(), rng)


def check_forward(op: Any, case: Case) -> None:
    for dtype, roundings in (("float32", 10), (bfloat16, 2)):
        arrays = case.arrays(dtype)
        gate, up = (arrays[name].astype("float64") for name in ("gate", "up"))
        y, _ = op.forward(**arrays)
        assert y.dtype == dtype
        exact = gate * _sigmoid(gate) * up
        underflow = np.abs(gate * up) * SMALLEST / gamma(roundings, dtype)
        assert_within(y, exact, np.abs(exact) + underflow, roundings, dtype)


@in_float64
def check_range(op: Any, case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    gate = rng.standard_normal((case.n, case.f)) * 10.0 ** rng.integers(-3, 5)
    gate[0, 0] = -1.2784645  # where silu is least
    for dtype in ("float64", "float32"):
        silu, _ = op.forward(gate.astype(dtype), np.ones_like(gate, dtype))
        slack = 8 * np.finfo(dtype).eps
        assert np.isfinite(silu).all()
        assert (silu >= np.maximum(np.minimum(gate, 0), -0.2784645428) * (1 + slack)).all()
        assert (silu <= np.maximum(gate, 0) * (1 + slack)).all()
        assert abs(float(silu[0, 0]) + 0.2784645428) < 1e-7


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    dy = np.ones((case.n, case.f), "float32")
    assert_unchanged({**arrays, "dy": dy}, lambda: op.backward(op.forward(**arrays)[1], dy))


def check_agreement(op: Any, case: Case) -> None:
    for dtype in (bfloat16, "float32"):
        arrays, rng = case.arrays(dtype), np.random.default_rng(case.seed + 1)
        arrays["dy"] = rng.standard_normal((case.n, case.f)).astype(dtype)
        exact = widened(arrays)
        dy, dy_exact = arrays.pop("dy"), exact.pop("dy")
        y, saved = op.forward(**arrays)
        y_exact, saved_exact = swiglu.forward(**exact)
        assert_agrees(y, y_exact, "y")
        grads, grads_exact = op.backward(saved, dy), swiglu.backward(saved_exact, dy_exact)
        for name, exact_grad in grads_exact._asdict().items():
            assert_agrees(getattr(grads, name), exact_grad, f"d{name}")


CHECKS = {
    "SWIGLU-001": check_gradients,
    "SWIGLU-002": check_forward,
    "SWIGLU-003": check_range,
    "SWIGLU-004": check_inputs_unchanged,
    "SWIGLU-005": check_agreement,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": swiglu.forward, "backward": swiglu.backward} | changes)


def _activated_by(function: Any) -> SimpleNamespace:
    return _bug(forward=lambda gate, up: ((function(gate) * up).astype(gate.dtype), None))


def _overflowing(gate: Any) -> Any:
    return gate * np.exp(gate) / (1 + np.exp(gate))


def _in_place(gate: Any, up: Any) -> Any:
    y, saved = swiglu.forward(gate, up)
    gate *= up
    return y, saved


MUTANTS = {
    "sigmoid_as_derivative": _bug(
        backward=lambda s, dy: swiglu.backward(s, dy)._replace(gate=dy * s.up * _sigmoid(s.gate))
    ),
    "swapped_gradients": _bug(backward=lambda s, dy: Grads(*swiglu.backward(s, dy)[::-1])),
    "relu_for_silu": _activated_by(lambda gate: np.maximum(gate, 0)),
    "gates_with_up": _bug(forward=lambda gate, up: swiglu.forward(up, gate)),
    "tanh_approximation": _activated_by(
        lambda g: 0.5 * g * (1 + np.tanh(0.79788456 * (g + 0.044715 * g * g * g)))
    ),
    "overflowing_sigmoid": _activated_by(_overflowing),
    "relu_squared": _activated_by(lambda gate: np.maximum(gate, 0) ** 2),
    "multiplies_in_place": _bug(forward=_in_place),
    "stores_past_the_end": Emulated(lora.cuda.swiglu, ("pack.cuh", "if (column + i < width) row", "row")),
    "takes_a_part_for_a_pack": Emulated(lora.cuda.swiglu, ("pack.cuh", " && width % N == 0", "")),
    "skips_the_first_pack": Emulated(
        lora.cuda.swiglu, ("swiglu.cu", "threadIdx.x) * LANES<T>", "threadIdx.x + 1) * LANES<T>")
    ),
    "gradient_of_up_from_the_new_gate": Emulated(
        lora.cuda.swiglu, ("swiglu.cu", "u[i] = d[i] * silu;", "u[i] = d[i] * g[i];")
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
