"""Attempts to falsify contracts/ops/sigmoid_gate.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.ops import sigmoid_gate
from lora.ops.sigmoid_gate import Grads
from tests.harness.bounds import assert_within, gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import implementations, tried
from tests.ops.observe import assert_unchanged

CONTRACT = op_contract("sigmoid_gate")
IMPLEMENTATIONS = implementations(sigmoid_gate)


class Case(NamedTuple):
    n: int
    d: int
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        return {name: textured(rng, (self.n, self.d), self.texture, dtype) for name in ("x", "gate")}


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "ND"), textures, seeds)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function in float64, by the form that overflows for neither sign."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def check_gradients(op: Any, case: Case) -> None:
    # at gates of ten thousand a sigmoid is a step, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays, rng = case.arrays("float64"), np.random.default_rng(case.seed + 1)
    dy = rng.standard_normal((case.n, case.d))
    grads = op.backward(op.forward(**arrays)[1], dy)
    assert_gradients(lambda **inputs: op.forward(**inputs)[0], arrays, (dy,), grads._asdict(), rng)


def check_forward(op: Any, case: Case) -> None:
    for dtype, roundings in (("float32", 8), (bfloat16, 2)):
        arrays = case.arrays(dtype)
        x, gate = (arrays[name].astype("float64") for name in ("x", "gate"))
        y, _ = op.forward(**arrays)
        assert y.dtype == dtype
        exact = x * _sigmoid(gate)
        underflow = np.abs(x) * float(np.finfo("float32").tiny) / gamma(roundings, dtype)
        assert_within(y, exact, np.abs(exact) + underflow, roundings, dtype)


def check_open_and_shut(op: Any, case: Case) -> None:
    x = case.arrays("float32")["x"]
    np.testing.assert_array_equal(op.forward(x, np.full_like(x, 100))[0], x)
    assert (np.abs(op.forward(x, np.full_like(x, -100))[0]) <= 1e-37 * np.abs(x)).all()


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    dy = np.ones((case.n, case.d), "float32")
    assert_unchanged({**arrays, "dy": dy}, lambda: op.backward(op.forward(**arrays)[1], dy))


CHECKS = {
    "GATE-001": check_gradients,
    "GATE-002": check_forward,
    "GATE-003": check_open_and_shut,
    "GATE-004": check_inputs_unchanged,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": sigmoid_gate.forward, "backward": sigmoid_gate.backward} | changes)


def _opened_by(function: Any) -> SimpleNamespace:
    return _bug(forward=lambda x, gate: ((x * function(gate)).astype(x.dtype), sigmoid_gate.Saved(x, gate)))


def _in_place(x: Any, gate: Any) -> Any:
    y, saved = sigmoid_gate.forward(x, gate)
    x[...] = y + 1
    return y, saved


MUTANTS = {
    "forgets_the_slope": _bug(
        backward=lambda s, dy: sigmoid_gate.backward(s, dy)._replace(gate=dy * s.x * _sigmoid(s.gate))
    ),
    "swapped_gradients": _bug(backward=lambda s, dy: Grads(*sigmoid_gate.backward(s, dy)[::-1])),
    "silu_for_sigmoid": _opened_by(lambda gate: gate * _sigmoid(gate)),
    "gates_with_x": _bug(forward=lambda x, gate: sigmoid_gate.forward(gate, x)),
    "hard_sigmoid": _opened_by(lambda gate: np.clip(gate / 6 + 0.5, 0, 1)),
    "overflowing_sigmoid": _opened_by(lambda gate: np.exp(gate) / (1 + np.exp(gate))),
    "multiplies_in_place": _bug(forward=_in_place),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
