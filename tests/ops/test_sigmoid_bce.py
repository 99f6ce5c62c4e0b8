"""Attempts to falsify contracts/ops/sigmoid_bce.yaml."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16, wide
from lora.contracts import op_contract
from lora.errors import DataError, ShapeError, UsageError
from lora.ops import sigmoid_bce, softmax_xent
from lora.ops.sigmoid_bce import Grads, Outcome, Saved
from tests.harness.bounds import gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import implementations, in_float64, tried
from tests.ops.observe import assert_refused, assert_unchanged

CONTRACT = op_contract("sigmoid_bce")
IMPLEMENTATIONS = implementations(sigmoid_bce)
SCALARS = {"normalizer": 3.5, "wants_weight": True}


class Case(NamedTuple):
    n: int
    d: int
    c: int
    biased: bool
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        return {
            "hidden": textured(rng, (self.n, self.d), self.texture, dtype),
            "weight": rng.standard_normal((self.c, self.d)).astype(dtype),
            "targets": rng.integers(0, 2, (self.n, self.c)),
            "bias": rng.standard_normal(self.c).astype(dtype) if self.biased else None,
        }


CASES = st.builds(
    Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "NDC"), st.booleans(), textures, seeds
)


def exact_logits(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return (logits, the sum of the absolute terms of each), both [N, C] float64."""
    hidden, weight = (arrays[name].astype("float64") for name in ("hidden", "weight"))
    bias = 0.0 if arrays["bias"] is None else arrays["bias"].astype("float64")
    return hidden @ weight.T + bias, np.abs(hidden) @ np.abs(weight).T + np.abs(bias)


def exact_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the loss of each label [N, C]: log(1 + exp(s z)), by the form of NumPy that never overflows."""
    return np.logaddexp(0.0, np.where(targets == 1, -logits, logits))


@in_float64
def check_gradients(op: Any, case: Case) -> None:
    # at logits of ten thousand the loss is a kink, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays = case.arrays("float64")
    grads = op.backward(op.forward(**arrays, **SCALARS)[1])
    inputs = {k: arrays[k] for k in ("hidden", "weight", "bias") if arrays[k] is not None}

    def loss(**inputs: Any) -> Any:
        return np.array(op.forward(**{**arrays, **inputs}, **SCALARS)[0].loss)

    assert_gradients(loss, inputs, (np.ones(()),), grads._asdict(), np.random.default_rng(case.seed + 1))
    assert (grads.bias is None) == (not case.biased)


def check_outcome(op: Any, case: Case) -> None:
    for dtype in ("float32", bfloat16):
        arrays = case.arrays(dtype)
        outcome, saved = op.forward(**arrays, **SCALARS)
        logits, magnitude = exact_logits(arrays)
        losses, error = exact_losses(logits, arrays["targets"]), gamma(case.d + 4, "float32") * magnitude
        bound = (error + gamma(8, "float32") * losses).sum() / 3.5
        assert abs(outcome.loss - losses.sum() / 3.5) <= bound + 1e-37
        right, clear = (logits > 0) == (arrays["targets"] == 1), np.abs(logits) > error
        certain = int((right & clear).all(axis=1).sum())
        assert certain <= outcome.correct <= int((right | ~clear).all(axis=1).sum())
        grads = op.backward(saved)
        assert grads.hidden.dtype == dtype
        assert grads.weight.dtype == "float32"


def check_sure_and_right(op: Any, case: Case) -> None:
    # one input of 1, so that a logit is its weight, exactly
    targets = case.arrays("float32")["targets"]
    for size in (12.0, 30.0, 60.0, 1e4):
        weight = np.full((case.c, 1), size, "float32")
        signs = np.where(targets == 1, 1.0, -1.0).astype("float32")
        losses = []
        for row in range(case.n):
            arrays = {"hidden": np.ones((1, 1), "float32"), "weight": weight * signs[row][:, None]}
            outcome, saved = op.forward(**arrays, targets=targets[row : row + 1], **SCALARS)
            losses.append(outcome.loss)
            grads = op.backward(saved)
            assert outcome.correct == 1
            np.testing.assert_allclose(
                np.abs(grads.weight) * 3.5,
                1 / (1 + np.exp(np.float64(size))) if size < 700 else 0.0,
                rtol=1e-5,
            )
            wrong, saved = op.forward(**arrays, targets=1 - targets[row : row + 1], **SCALARS)
            assert wrong.loss == pytest.approx(case.c * size / 3.5, rel=1e-5)
            np.testing.assert_allclose(np.abs(op.backward(saved).weight) * 3.5, 1.0, rtol=1e-5)
        expected = case.c * np.log1p(np.exp(-np.float64(size))) / 3.5
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@in_float64
def check_each_label_alone(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float64")
    outcome, saved = op.forward(**arrays, **SCALARS)
    together = op.backward(saved)
    loss, dhidden = 0.0, np.zeros_like(arrays["hidden"])
    for label in range(case.c):
        one = slice(label, label + 1)
        bias = None if arrays["bias"] is None else arrays["bias"][one]
        alone = {
            **arrays,
            "weight": arrays["weight"][one],
            "targets": arrays["targets"][:, one],
            "bias": bias,
        }
        outcome_alone, saved = op.forward(**alone, **SCALARS)
        grads = op.backward(saved)
        loss, dhidden = loss + outcome_alone.loss, dhidden + grads.hidden
        np.testing.assert_allclose(together.weight[one], grads.weight, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(outcome.loss, loss, rtol=1e-11)
    np.testing.assert_allclose(together.hidden, dhidden, rtol=1e-11, atol=1e-13)


def check_wants(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    outcome, saved = op.forward(**arrays, **SCALARS)
    frozen, saved_frozen = op.forward(**arrays, **{**SCALARS, "wants_weight": False})
    judged, saved_judged = op.forward(**arrays, **{**SCALARS, "wants_gradient": False})
    assert outcome == frozen == judged
    grads = op.backward(saved_frozen)
    assert grads.weight is None
    assert grads.bias is None
    np.testing.assert_array_equal(grads.hidden, op.backward(saved).hidden)
    assert_refused(UsageError, "wants_gradient=False", lambda: op.backward(saved_judged))


def check_refusals(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    for foreign in (2, -1, -100):
        targets = arrays["targets"].copy()
        targets[case.n // 2, case.c // 2] = foreign
        call = partial(op.forward, **{**arrays, "targets": targets}, normalizer=1.0)
        assert_refused(DataError, str(foreign), call)
    for normalizer in (0.0, -1.0, float("nan")):
        assert_refused(DataError, str(normalizer), partial(op.forward, **arrays, normalizer=normalizer))
    misfits = {
        "targets": arrays["targets"][:, :1] if case.c > 1 else np.zeros((case.n, 2), int),
        "weight": np.ones((case.c, case.d + 1)),
        "bias": np.ones(case.c + 1),
    }
    for name, array in misfits.items():
        assert_refused(ShapeError, name, partial(op.forward, **{**arrays, name: array}, normalizer=1.0))


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    assert_unchanged(arrays, lambda: op.backward(op.forward(**arrays, **SCALARS)[1]))


CHECKS = {
    "BCE-001": check_gradients,
    "BCE-002": check_outcome,
    "BCE-003": check_sure_and_right,
    "BCE-004": check_each_label_alone,
    "BCE-005": check_wants,
    "BCE-006": check_refusals,
    "BCE-007": check_inputs_unchanged,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": sigmoid_bce.forward, "backward": sigmoid_bce.backward}
    return SimpleNamespace(**right | changes)


def _changed(change: Any) -> SimpleNamespace:
    """Return the operation whose arguments are `change`d first."""

    def forward(hidden: Any, weight: Any, targets: Any, bias: Any = None, **named: Any) -> Any:
        arrays = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        return sigmoid_bce.forward(**{**arrays, **named, **change({**arrays, **named})})

    return _bug(forward=forward)


def _gradients_of(change: Any) -> SimpleNamespace:
    """Return the operation whose gradients alone are those of `change`d arguments."""
    wrong = _changed(change)
    return _bug(forward=lambda *a, **k: (sigmoid_bce.forward(*a, **k)[0], wrong.forward(*a, **k)[1]))


def _outcome_of(change: Any) -> SimpleNamespace:
    """Return the operation whose outcome is `change(outcome, logits, targets)`."""

    def forward(hidden: Any, weight: Any, targets: Any, bias: Any = None, **named: Any) -> Any:
        outcome, saved = sigmoid_bce.forward(hidden, weight, targets, bias, **named)
        logits = wide(hidden) @ wide(weight).T + (0 if bias is None else wide(bias))
        return change(outcome, logits, targets), saved

    return _bug(forward=forward)


def _softmax(hidden: Any, weight: Any, targets: Any, bias: Any = None, **named: Any) -> Any:
    outcome, saved = softmax_xent.forward(hidden, weight, targets.argmax(axis=1), bias, **named)
    return Outcome(*outcome), Saved(saved.grads and Grads(*saved.grads))


def _subtracting(outcome: Outcome, logits: Any, targets: Any) -> Outcome:
    losses = np.maximum(logits, 0) + np.log1p(np.exp(-np.abs(logits))) - targets.astype(logits.dtype) * logits
    return outcome._replace(loss=float(losses.sum()) / 3.5)


def _log_of_p(outcome: Outcome, logits: Any, targets: Any) -> Outcome:
    p = 1 / (1 + np.exp(-logits))
    return outcome._replace(loss=float(-np.log(np.where(targets == 1, p, 1 - p)).sum()) / 3.5)


def _broadcasting(arrays: dict[str, Any]) -> dict[str, Any]:
    shape = (len(arrays["hidden"]), len(arrays["weight"]))
    fits = arrays["targets"].shape[1] in (1, shape[1])
    return {"targets": np.broadcast_to(arrays["targets"], shape)} if fits else {}


def _shifting(arrays: dict[str, Any]) -> dict[str, Any]:
    arrays["hidden"] += 1
    return {}


MUTANTS = {
    "forgets_the_targets": _gradients_of(lambda a: {"targets": np.zeros_like(a["targets"])}),
    "forgets_the_normalizer_in_backward": _gradients_of(lambda a: {"normalizer": 1.0}),
    "swaps_the_sign": _gradients_of(lambda a: {"targets": 1 - a["targets"]}),
    "forgets_the_bias": _changed(lambda a: {"bias": None}),
    "averages_over_labels": _changed(lambda a: {"normalizer": a["normalizer"] * len(a["weight"])}),
    "counts_labels": _outcome_of(
        lambda outcome, logits, y: outcome._replace(correct=int(((logits > 0) == (y == 1)).sum()))
    ),
    "counts_rows_with_any_label_right": _outcome_of(
        lambda outcome, logits, y: outcome._replace(correct=int(((logits > 0) == (y == 1)).any(1).sum()))
    ),
    "is_a_softmax": _bug(forward=_softmax),
    "subtracts_the_target_s_logit": _outcome_of(_subtracting),
    "takes_the_log_of_p": _outcome_of(_log_of_p),
    "hands_out_zeros": _bug(backward=lambda saved: saved.grads or Grads(np.zeros(1), None, None)),
    "trains_the_head_always": _changed(lambda a: {"wants_weight": True}),
    "takes_any_target": _changed(lambda a: {"targets": a["targets"] % 2}),
    "broadcasts_the_targets": _changed(_broadcasting),
    "shifts_hidden_in_place": _changed(_shifting),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
