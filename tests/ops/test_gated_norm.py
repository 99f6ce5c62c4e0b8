"""Attempts to falsify contracts/ops/gated_norm.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.ops import gated_norm, rmsnorm, swiglu
from tests.harness.bounds import assert_within, gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import implementations, tried
from tests.ops.observe import assert_unchanged

CONTRACT = op_contract("gated_norm")
IMPLEMENTATIONS = implementations(gated_norm)
EPS = 1e-6


class Case(NamedTuple):
    n: int
    h: int
    w: int
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        shape = (self.n, self.h, self.w)
        arrays = {name: textured(rng, shape, self.texture, dtype) for name in ("x", "gate")}
        return arrays | {"weight": rng.standard_normal(self.w).astype(dtype)}


CASES = st.builds(Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "NHW"), textures, seeds)


def _silu(gate: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(gate))
    return gate * np.where(gate >= 0, 1, e) / (1 + e)


def _normed(x: np.ndarray, axes: tuple[int, ...] = (-1,)) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + EPS)


def check_gradients(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float64")
    rng = np.random.default_rng(case.seed + 1)
    dy = rng.standard_normal(arrays["x"].shape)

    def forward(**inputs: Any) -> Any:
        # eps well above zero: at W = 1 the norm is a step function, which no difference can follow
        return op.forward(**inputs, eps=0.5)[0]

    saved = op.forward(**arrays, eps=0.5)[1]
    grads = op.backward(saved, dy, wants_weight=True)
    assert_gradients(forward, arrays, (dy,), grads._asdict(), rng)
    assert op.backward(saved, dy).weight is None


def check_forward(op: Any, case: Case) -> None:
    for dtype, roundings in (("float32", case.w + 20), (bfloat16, 4)):
        arrays = case.arrays(dtype)
        x, gate, weight = (array.astype("float64") for array in arrays.values())
        y, _ = op.forward(**arrays, eps=EPS)
        assert y.dtype == dtype
        exact = _normed(x) * weight * _silu(gate)
        underflow = np.abs(_normed(x) * weight * gate) * float(np.finfo("float32").tiny)
        assert_within(y, exact, np.abs(exact) + underflow / gamma(roundings, dtype), roundings, dtype)


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    dy = np.ones_like(arrays["x"])

    def run() -> None:
        op.backward(op.forward(**arrays, eps=EPS)[1], dy, wants_weight=True)

    assert_unchanged({**arrays, "dy": dy}, run)


CHECKS = {
    "GATEDNORM-001": check_gradients,
    "GATEDNORM-002": check_forward,
    "GATEDNORM-003": check_inputs_unchanged,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": gated_norm.forward, "backward": gated_norm.backward} | changes)


def _defined(equation: Any) -> SimpleNamespace:
    def forward(x: Any, gate: Any, weight: Any, *, eps: float) -> Any:
        y = equation(*(array.astype("float64") for array in (x, gate, weight)))
        return y.astype(x.dtype), gated_norm.forward(x, gate, weight, eps=eps)[1]

    return _bug(forward=forward)


def _without_projection(saved: Any, dy: Any, **wants: Any) -> Any:
    dnormed = swiglu.backward(saved.gate, dy).up
    dx = saved.norm.rstd * dnormed * saved.norm.weight
    return gated_norm.backward(saved, dy, **wants)._replace(x=dx)


def _ungated(saved: Any, dy: Any, **wants: Any) -> Any:
    return gated_norm.backward(saved, dy, **wants)._replace(x=rmsnorm.backward(saved.norm, dy).x)


def _one_head(saved: Any, dy: Any, **wants: Any) -> Any:
    first = dy.copy()
    first[:, 1:] = 0
    right, wrong = (gated_norm.backward(saved, d, **wants) for d in (dy, first))
    return right._replace(weight=wrong.weight)


def _in_place(x: Any, gate: Any, weight: Any, *, eps: float) -> Any:
    y, saved = gated_norm.forward(x, gate, weight, eps=eps)
    gate *= -0.5
    return y, saved


MUTANTS = {
    "misses_the_projection": _bug(backward=_without_projection),
    "ungated_gradient": _bug(backward=_ungated),
    "weight_gradient_of_one_head": _bug(backward=_one_head),
    "zero_centred_norm": _defined(lambda x, gate, weight: _normed(x) * (1 + weight) * _silu(gate)),
    "gates_before_the_norm": _defined(lambda x, gate, weight: _normed(x * _silu(gate)) * weight),
    "sigmoid_for_silu": _defined(lambda x, gate, weight: _normed(x) * weight * 0.5 * (1 + np.tanh(gate / 2))),
    "norm_over_all_heads": _defined(lambda x, gate, weight: _normed(x, (-2, -1)) * weight * _silu(gate)),
    "gates_in_place": _bug(forward=_in_place),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
