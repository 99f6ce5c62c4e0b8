"""Attempts to falsify contracts/ops/adamw.yaml."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import adamw
from tests.harness.bounds import gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted
from tests.ops.observe import assert_refused, peak_bytes

CONTRACT = op_contract("adamw")
IMPLEMENTATIONS = [adamw]


class Case(NamedTuple):
    p: int
    t: int
    lr: float
    weight_decay: float
    eps: float
    texture: str
    seed: int

    @property
    def scalars(self) -> dict[str, float]:
        decays = {"beta1": 0.9, "beta2": 0.999}
        return {"lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps} | decays

    def param(self, dtype: str) -> np.ndarray:
        return np.random.default_rng(self.seed).standard_normal(self.p).astype(dtype)

    def grads(self, dtype: str) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed + 1)
        return [np.ascontiguousarray(textured(rng, (self.p,), self.texture, dtype)) for _ in range(self.t)]


CASES = st.builds(
    Case,
    *(st.integers(*CONTRACT.domain[axis]) for axis in "PT"),
    st.sampled_from((1e-1, 2e-4, 0.0)),
    st.sampled_from((0.0, 0.01, 0.5)),
    st.sampled_from((1e-8, 1e-3)),
    textures,
    seeds,
)


def _moved(op: Any, case: Case, param: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    m, v = np.zeros_like(param), np.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        op.update(param, grad, m, v, step=step, **case.scalars)
    return param


def _by_hand(
    p: float, grads: list[float], *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
):
    """Return one parameter after its gradients, by the paper's formula in Python's own float64."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - math.pow(beta1, t)), v / (1 - math.pow(beta2, t))
        p = p - lr * weight_decay * p - lr * m_hat / (math.sqrt(v_hat) + eps)
    return p


def check_formula(op: Any, case: Case) -> None:
    for dtype, relative in (("float64", 1e-12), ("float32", gamma(16 * case.t, "float32"))):
        param, grads = case.param(dtype), case.grads(dtype)
        expected = [
            _by_hand(float(param[i]), [float(g[i]) for g in grads], **case.scalars) for i in range(case.p)
        ]
        bound = relative * (np.abs(param).astype("float64") + 4 * case.t * case.lr)
        assert (np.abs(_moved(op, case, param, grads) - np.array(expected)) <= bound).all()


def check_decay_alone(op: Any, case: Case) -> None:
    param = case.param("float32")
    expected = param.copy()
    for _ in range(case.t):
        expected *= 1 - case.lr * case.weight_decay
    found = _moved(op, case, param, [np.zeros_like(param)] * case.t)
    np.testing.assert_array_equal(found, expected)


def check_first_step(op: Any, case: Case) -> None:
    case = case._replace(lr=0.125, weight_decay=0.0, eps=1e-30)
    rng = np.random.default_rng(case.seed)
    grad = (rng.choice([-1, 1], case.p) * 10.0 ** rng.uniform(-12, 18, case.p)).astype("float32")
    param = case.param("float32")
    move = _moved(op, case, param.copy(), [grad]).astype("float64") - param
    bound = gamma(12, "float32") * (np.abs(param) + case.lr)
    assert (np.abs(move + case.lr * np.sign(grad)) <= bound).all()


def check_in_place(op: Any, case: Case) -> None:
    size = adamw.BLOCK + case.p  # the last block is not whole
    rng = np.random.default_rng(case.seed)
    param, grad = rng.standard_normal((2, size)).astype("float32")
    m, v, before = np.zeros_like(param), np.zeros_like(param), (param.copy(), grad.copy())
    op.update(param, grad, m, v, step=1, **case._replace(lr=0.125, weight_decay=0.0, eps=1e-30).scalars)
    np.testing.assert_array_equal(grad, before[1])
    np.testing.assert_allclose(param, before[0] - 0.125 * np.sign(grad), atol=2e-6)
    np.testing.assert_allclose(m, 0.1 * grad, rtol=1e-6)
    np.testing.assert_allclose(v, 0.001 * grad * grad, rtol=1e-6)


def check_refusals(op: Any, case: Case) -> None:
    size = case.p + 1
    odd = {
        "not contiguous": np.ones(2 * size, "float32")[::2],
        "float64": np.ones(size),
        f"[{case.p}]": np.ones(case.p, "float32"),
    }
    for words, array in odd.items():
        for place in range(4):
            arrays = [np.ones(size, "float32") for _ in range(4)]
            arrays[place] = array
            assert_refused(ShapeError, words, partial(op.update, *arrays, step=1, **case.scalars))


def check_memory(op: Any, case: Case) -> None:
    param, grad, m, v = np.ones((4, 8 * adamw.BLOCK), "float32")
    assert peak_bytes(lambda: op.update(param, grad, m, v, step=1, **case.scalars)) < param.nbytes / 4


CHECKS = {
    "ADAMW-001": check_formula,
    "ADAMW-002": check_decay_alone,
    "ADAMW-003": check_first_step,
    "ADAMW-004": check_in_place,
    "ADAMW-005": check_refusals,
    "ADAMW-006": check_memory,
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


def _bug(update: Any) -> SimpleNamespace:
    return SimpleNamespace(update=update)


def _variant(
    *, coupled: bool = False, corrected: bool = True, root: str = "outside", late: bool = False
) -> Any:
    """Return an update in plain NumPy with one thing wrong; with nothing wrong, it is the formula."""

    def update(param: Any, grad: Any, m: Any, v: Any, *, step: int, **s: float) -> None:
        grad = grad + s["weight_decay"] * param if coupled else grad
        keep = 1 - (0 if coupled else s["lr"] * s["weight_decay"])
        m[...] = s["beta1"] * m + (1 - s["beta1"]) * grad
        v[...] = s["beta2"] * v + (1 - s["beta2"]) * grad**2
        one, two = (1 - s[beta] ** step if corrected else 1 for beta in ("beta1", "beta2"))
        denominator = {
            "outside": np.sqrt(v / two) + s["eps"],
            "inside": np.sqrt(v / two + s["eps"]),
            "uncorrected": (np.sqrt(v) + s["eps"]) / np.sqrt(two),
        }[root]
        share = s["lr"] * m / one / denominator
        param[...] = (param - share) * keep if late else param * keep - share

    return _bug(update)


def _decays_by_lambda(
    param: Any, grad: Any, m: Any, v: Any, *, lr: float, weight_decay: float, **s: Any
) -> None:
    param *= 1 - weight_decay
    adamw.update(param, grad, m, v, lr=lr, weight_decay=0.0, **s)


def _moves_a_copy(param: Any, grad: Any, m: Any, v: Any, **s: Any) -> None:
    adamw.update(*(np.array(array, "float32", order="C") for array in (param, grad, m, v)), **s)


def _one_block(param: Any, grad: Any, m: Any, v: Any, **s: Any) -> None:
    adamw.update(*(array[: adamw.BLOCK] for array in (param, grad, m, v)), **s)


def _consumes(param: Any, grad: Any, m: Any, v: Any, **s: Any) -> None:
    adamw.update(param, grad, m, v, **s)
    grad[...] = 0


MUTANTS = {
    "couples_the_decay": _variant(coupled=True),
    "forgets_the_bias_correction": _variant(corrected=False),
    "eps_inside_the_root": _variant(root="inside"),
    "eps_uncorrected": _variant(root="uncorrected"),
    "decays_after_the_step": _variant(late=True),
    "decays_by_lambda_alone": _bug(_decays_by_lambda),
    "clips_the_gradient": _bug(
        lambda p, g, m, v, **s: adamw.update(p, np.clip(g, -1e-9, 1e-9), m, v, **s | {"eps": 1e-8})
    ),
    "moves_a_copy": _bug(_moves_a_copy),
    "stops_after_one_block": _bug(_one_block),
    "consumes_the_gradient": _bug(_consumes),
    "temporary_of_full_size": _variant(),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
