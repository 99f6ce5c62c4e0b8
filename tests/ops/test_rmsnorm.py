"""Attempts to falsify contracts/ops/rmsnorm.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import op_contract
from lora.ops import rmsnorm
from lora.ops.rmsnorm import Grads
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.gradcheck import assert_gradients

CONTRACT = op_contract("rmsnorm")
IMPLEMENTATIONS = [rmsnorm]
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
    *(st.integers(*CONTRACT.domain[axis]) for axis in "ND"),
    textures,
    st.booleans(),
    seeds,
)


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


CHECKS = {
    "RMSNORM-001": check_gradients,
    "RMSNORM-002": check_scaling_changes_no_bit,
    "RMSNORM-003": check_forward,
    "RMSNORM-004": check_inputs_unchanged,
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": rmsnorm.forward, "backward": rmsnorm.backward} | changes)


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
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
