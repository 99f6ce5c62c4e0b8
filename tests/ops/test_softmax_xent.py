"""Attempts to falsify contracts/ops/softmax_xent.yaml."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.softmax_xent
from lora.backend import bfloat16, wide
from lora.contracts import op_contract
from lora.errors import DataError, ShapeError, UsageError
from lora.ops import softmax_xent
from lora.ops.softmax_xent import IGNORED, Grads, Outcome, chunk_rows
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_refused, assert_unchanged, peak_bytes

CONTRACT = op_contract("softmax_xent")
IMPLEMENTATIONS = implementations(softmax_xent)


class Case(NamedTuple):
    n: int
    d: int
    v: int
    c: int  # rows of a chunk
    biased: bool
    weighted: bool
    ignored: float  # share of the rows
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        targets = rng.integers(0, self.v, self.n)
        targets[rng.random(self.n) < self.ignored] = IGNORED
        arrays = {
            "hidden": textured(rng, (self.n, self.d), self.texture, dtype),
            "weight": rng.standard_normal((self.v, self.d)).astype(dtype),
            "targets": targets,
            "bias": rng.standard_normal(self.v).astype(dtype),
            "row_weights": rng.uniform(0, 3, self.n).astype("float64" if dtype == "float64" else "float32"),
        }
        return (
            arrays
            | ({} if self.biased else {"bias": None})
            | ({} if self.weighted else {"row_weights": None})
        )

    def scalars(self, itemsize: int = 8) -> dict[str, Any]:
        return {"normalizer": 3.5, "wants_weight": True, "chunk_bytes": self.c * self.v * itemsize}


CASES = st.builds(
    Case,
    *(st.integers(*CONTRACT.domain[axis]) for axis in "NDVC"),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0.0, 0.3, 1.0)),
    textures,
    seeds,
)


class Row(NamedTuple):
    """One counted row of the float64 equation."""

    loss: float  # weighted, before the normalizer
    bound: float  # of its error in float32
    led: bool  # its largest logit is the target's
    clear: bool  # and by more than rounding could turn


def _rows(arrays: dict[str, Any], unit: float) -> list[Row]:
    """Return the counted rows, by the definition, one at a time; `unit` is one rounding."""
    bias = np.zeros(len(arrays["weight"])) if arrays["bias"] is None else arrays["bias"].astype("float64")
    weight, rows = arrays["weight"].astype("float64"), []
    width = weight.shape[1]
    for n, (h, target) in enumerate(zip(arrays["hidden"].astype("float64"), arrays["targets"], strict=True)):
        if target == IGNORED:
            continue
        logits = weight @ h + bias
        error = (width + 4) * unit * (np.abs(weight) @ np.abs(h) + np.abs(bias)).max()
        loss = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
        w = 1.0 if arrays["row_weights"] is None else float(arrays["row_weights"][n])
        margin = logits.max() - np.sort(logits)[-2] if len(logits) > 1 else np.inf
        bound = 2 * error + (len(logits) + 8) * unit * (1 + loss)
        rows.append(Row(w * loss, w * bound, bool(logits.argmax() == target), bool(margin > 2 * error)))
    return rows


@in_float64
def check_gradients(op: Any, case: Case) -> None:
    # at logits of ten thousand the loss is a chain of kinks, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays = case.arrays("float64")
    grads = op.backward(op.forward(**arrays, **case.scalars())[1])
    inputs = {k: arrays[k] for k in ("hidden", "weight", "bias") if arrays[k] is not None}

    def loss(**inputs: Any) -> Any:
        return np.array(op.forward(**{**arrays, **inputs}, **case.scalars())[0].loss)

    rng = np.random.default_rng(case.seed + 1)
    assert_gradients(loss, inputs, (np.ones(()),), grads._asdict(), rng)
    assert (grads.bias is None) == (not case.biased)


def check_outcome(op: Any, case: Case) -> None:
    # bfloat16 rounds the inputs, which the equation reads too: the sums are float32 either way
    for dtype in ("float32", bfloat16):
        arrays = case.arrays(dtype)
        outcome, saved = op.forward(**arrays, **case.scalars(4))
        rows = _rows(arrays, gamma(1, "float32"))
        exact, bound = (sum(getattr(row, field) for row in rows) / 3.5 for field in ("loss", "bound"))
        assert abs(outcome.loss - exact) <= bound, f"{outcome.loss} against {exact}, bound {bound}"
        certain = sum(row.led and row.clear for row in rows)
        assert certain <= outcome.correct <= certain + sum(not row.clear for row in rows)
        grads = op.backward(saved)
        assert grads.hidden.dtype == dtype
        assert grads.weight.dtype == "float32"


@in_float64
def check_chunks_equal_one(op: Any, case: Case) -> None:
    case = case._replace(texture="normal")
    arrays = case.arrays("float64")
    (chunked, saved), (whole, saved_whole) = (
        op.forward(**arrays, **case._replace(c=c).scalars()) for c in (case.c, case.n)
    )
    assert chunked.correct == whole.correct
    assert abs(chunked.loss - whole.loss) <= 1e-12 * max(1, abs(whole.loss))
    for found, expected in zip(op.backward(saved), op.backward(saved_whole), strict=True):
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def check_ignored_rows(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float32")
    outcome, saved = op.forward(**arrays, **case.scalars(4))
    hidden = arrays["hidden"].copy()
    hidden[arrays["targets"] == IGNORED] = np.nan
    poisoned, saved_poisoned = op.forward(**{**arrays, "hidden": hidden}, **case.scalars(4))
    assert poisoned == outcome
    grads = op.backward(saved)
    assert (grads.hidden[arrays["targets"] == IGNORED] == 0).all()
    for found, expected in zip(op.backward(saved_poisoned), grads, strict=True):
        if expected is not None:
            np.testing.assert_array_equal(found, expected)


def check_nothing_counted(op: Any, case: Case) -> None:
    arrays = case._replace(ignored=1.0).arrays("float32")
    arrays["targets"][...] = IGNORED
    outcome, saved = op.forward(**arrays, **case.scalars(4))
    assert outcome == Outcome(0.0, 0)
    assert all((grad == 0).all() for grad in op.backward(saved) if grad is not None)


def check_memory(op: Any, case: Case) -> None:
    vocabulary = 248_320
    case = case._replace(n=8, d=3, v=vocabulary, c=2, biased=True, ignored=0.0)
    arrays = case.arrays("float32")
    scalars = {**case.scalars(4), "wants_weight": False}
    peak = peak_bytes(lambda: op.forward(**arrays, **scalars))
    # the bias may be widened beside the logits, and a comparison or a copy of one row may be needed
    assert peak <= scalars["chunk_bytes"] + 1.5 * vocabulary * 4


def check_large_logits(op: Any, case: Case) -> None:
    case = case._replace(texture="normal", biased=False, weighted=False, ignored=0.0)
    arrays = case.arrays("float32")
    arrays["hidden"] *= 1e4
    outcome, saved = op.forward(**arrays, **case.scalars(4))
    logits = arrays["hidden"].astype("float64") @ arrays["weight"].astype("float64").T
    margins = logits.max(1) - logits[np.arange(case.n), arrays["targets"]]
    magnitude = (np.abs(arrays["hidden"]) @ np.abs(arrays["weight"]).T).max(1)
    slack = (gamma(2 * case.d + 4, "float32") * magnitude + 1.1 * np.log(case.v)).sum()
    assert abs(outcome.loss * 3.5 - margins.sum()) <= slack
    assert all(np.isfinite(grad).all() for grad in op.backward(saved) if grad is not None)


def check_wants(op: Any, case: Case) -> None:
    arrays, scalars = case.arrays("float32"), case.scalars(4)
    outcome, saved = op.forward(**arrays, **scalars)
    frozen, saved_frozen = op.forward(**arrays, **{**scalars, "wants_weight": False})
    judged, saved_judged = op.forward(**arrays, **{**scalars, "wants_gradient": False})
    assert outcome == frozen == judged
    grads = op.backward(saved_frozen)
    assert grads.weight is None
    assert grads.bias is None
    np.testing.assert_array_equal(grads.hidden, op.backward(saved).hidden)
    assert_refused(UsageError, "wants_gradient=False", lambda: op.backward(saved_judged))


def check_refusals(op: Any, case: Case) -> None:
    arrays = case._replace(ignored=0.0).arrays("float32")
    for foreign in (-1, -case.v, case.v):
        targets = arrays["targets"].copy()
        targets[case.n // 2] = foreign
        call = partial(op.forward, **{**arrays, "targets": targets}, normalizer=1.0)
        if foreign != IGNORED:
            assert_refused(DataError, str(foreign), call)
    for normalizer in (0.0, -1.0, float("nan")):
        assert_refused(DataError, str(normalizer), partial(op.forward, **arrays, normalizer=normalizer))
    longer = np.zeros(case.n + 1, int)
    misfits = {"targets": longer, "weight": np.ones((case.v, case.d + 1)), "row_weights": 1.0 * longer}
    misfits["bias"] = np.ones(case.v + 1)
    for name, array in misfits.items():
        assert_refused(ShapeError, name, partial(op.forward, **{**arrays, name: array}, normalizer=1.0))


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    assert_unchanged(arrays, lambda: op.backward(op.forward(**arrays, **case.scalars(4))[1]))


@in_float64
def check_smoothing(op: Any, case: Case) -> None:
    case = case._replace(texture="normal")
    arrays, smoothing = case.arrays("float64"), (1 + case.seed % 9) / 10
    plain, saved = op.forward(**arrays, **case.scalars())
    expected = [(1 - smoothing) * part for part in _loss_and_gradients(plain, op.backward(saved))]
    for target in range(case.v):
        targets = np.where(arrays["targets"] == IGNORED, IGNORED, target)
        outcome, saved = op.forward(**{**arrays, "targets": targets}, **case.scalars())
        of_class = _loss_and_gradients(outcome, op.backward(saved))
        expected = [a + smoothing / case.v * b for a, b in zip(expected, of_class, strict=True)]
    smoothed, saved = op.forward(**arrays, **case.scalars(), label_smoothing=smoothing)
    found = _loss_and_gradients(smoothed, op.backward(saved))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    assert smoothed.correct == plain.correct
    for foreign in (-0.1, 1.0, float("nan")):
        call = partial(op.forward, **arrays, normalizer=1.0, label_smoothing=foreign)
        assert_refused(UsageError, str(foreign), call)


def check_agreement(op: Any, case: Case) -> None:
    rng = np.random.default_rng(case.seed + 1)
    # more logits than a block reads at once, and rows that are not whole packs of 16 bytes
    vocabulary = int(rng.choice([case.v, 512 * 8, 512 * 8 + 8 * case.v, 512 * 8 + case.v]))
    case = case._replace(texture="normal", v=vocabulary, n=min(case.n, 9), c=min(case.c, 4))
    stored, computed = rng.permutation(["bfloat16", "float32", "bfloat16"])[:2]
    arrays = case.arrays(computed)
    arrays["weight"] = arrays["weight"].astype(stored)
    scalars = case.scalars(4) | {"label_smoothing": float(rng.choice([0.0, 0.1]))}
    outcome, saved = op.forward(**arrays, **scalars)
    exact, saved_exact = softmax_xent.forward(**widened(arrays), **scalars)
    assert abs(outcome.loss - exact.loss) <= 1e-5 * max(1.0, exact.loss)
    assert outcome.correct == exact.correct
    narrow = bfloat16 if "bfloat16" in (stored, computed) else np.dtype("float32")
    for name, found, expected in zip(
        Grads._fields, op.backward(saved), op.backward(saved_exact), strict=True
    ):
        if expected is not None:
            assert_agrees(found, expected, name, dtype=narrow)


def _loss_and_gradients(outcome: Outcome, grads: Grads) -> list[Any]:
    return [np.array(outcome.loss), *(grad for grad in grads if grad is not None)]


CHECKS = {
    "XENT-001": check_gradients,
    "XENT-002": check_outcome,
    "XENT-003": check_chunks_equal_one,
    "XENT-004": check_ignored_rows,
    "XENT-005": check_nothing_counted,
    "XENT-007": check_large_logits,
    "XENT-008": check_wants,
    "XENT-009": check_refusals,
    "XENT-010": check_inputs_unchanged,
    "XENT-011": check_smoothing,
    "XENT-012": check_agreement,
}
MEASURED = {"XENT-006": check_memory}  # on one case: what it allocates depends on sizes alone


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


@pytest.mark.parametrize("check", claimed(MEASURED))
def test_measured_claim(check: Any) -> None:
    case = {"biased": True, "weighted": True, "ignored": 0.0, "texture": "normal", "seed": 0}
    check(softmax_xent, Case(n=1, d=1, v=1, c=1, **case))


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": softmax_xent.forward, "backward": softmax_xent.backward}
    return SimpleNamespace(**right | changes)


def _kernel_bug(old: str, new: str, file: str = "softmax_xent.cu") -> Emulated:
    return Emulated(lora.cuda.softmax_xent, (file, old, new))


def _defined(
    hidden: Any,
    weight: Any,
    targets: Any,
    bias: Any = None,
    row_weights: Any = None,
    *,
    change: str,
    **scalars: Any,
) -> Any:
    """Run the equation over all rows at once in plain NumPy, with the one `change` that is the bug."""
    counted = targets != IGNORED
    hidden_, weight_ = wide(hidden), wide(weight)
    w = (counted if row_weights is None else counted * row_weights).astype(hidden_.dtype)
    normalizer = {"counted": counted.sum(), "all": len(targets)}.get(change, scalars["normalizer"])
    logits = hidden_ @ weight_.T + (0 if bias is None else wide(bias))
    shifted = logits if change == "unshifted" else logits - logits.max(1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    each, classes = np.arange(len(targets)), np.maximum(targets, 0)
    loss = (w * (np.log(np.exp(shifted).sum(1)) - shifted[each, classes])).sum() / normalizer
    dlogits = p
    if change != "onehot":
        dlogits[each, classes] -= 1
    dlogits *= w[:, None] / normalizer
    dhidden, dweight = (dlogits @ weight_).astype(hidden.dtype), dlogits.T @ hidden_
    grads = Grads(dhidden, dweight, None if bias is None else dlogits.sum(0))
    return Outcome(float(loss), int((counted & (logits.argmax(1) == targets)).sum())), softmax_xent.Saved(
        grads
    )


def _without(name: str, *, in_loss: bool) -> SimpleNamespace:
    """Return the operation that forgets an argument, in its loss or in its gradients alone."""

    def forward(*args: Any, **named: Any) -> Any:
        right = softmax_xent.forward(*args, **named)
        wrong = softmax_xent.forward(*args, **{**named, name: 1.0 if name == "normalizer" else None})
        return (wrong[0], right[1]) if in_loss else (right[0], wrong[1])

    return _bug(forward=forward)


def _counts_ignored(hidden: Any, weight: Any, targets: Any, **named: Any) -> Any:
    outcome, saved = softmax_xent.forward(hidden, weight, targets, **named)
    return outcome._replace(correct=outcome.correct + int((targets == IGNORED).sum())), saved


def _last_chunk_of_dweight(hidden: Any, weight: Any, targets: Any, **named: Any) -> Any:
    outcome, saved = softmax_xent.forward(hidden, weight, targets, **named)
    late, counted = targets.copy(), np.flatnonzero(targets != IGNORED)
    step = chunk_rows(len(counted), len(weight) * 8, named["chunk_bytes"])
    late[counted[: (len(counted) - 1) // step * step]] = IGNORED
    last = softmax_xent.forward(hidden, weight, late, **named)[1].grads
    return outcome, saved._replace(grads=saved.grads._replace(weight=last.weight))


def _loses_last_chunk(hidden: Any, weight: Any, targets: Any, **named: Any) -> Any:
    kept, counted = targets.copy(), np.flatnonzero(targets != IGNORED)
    step = chunk_rows(len(counted), len(weight) * 8, named["chunk_bytes"])
    kept[counted[max(step, len(counted) // step * step) :]] = IGNORED
    return softmax_xent.forward(hidden, weight, kept, **named)


def _trains_ignored(hidden: Any, weight: Any, targets: Any, **named: Any) -> Any:
    outcome, saved = softmax_xent.forward(hidden, weight, targets, **named)
    trained = softmax_xent.forward(hidden, weight, np.maximum(targets, 0), **named)[1]
    return outcome, trained if saved.grads else saved


def _hands_out_zeros(saved: Any) -> Any:
    return saved.grads or Grads(np.zeros(1), None, None)


def _always_trains_head(*args: Any, **named: Any) -> Any:
    return softmax_xent.forward(*args, **{**named, "wants_weight": True})


def _wrapping(hidden: Any, weight: Any, targets: Any, **named: Any) -> Any:
    return softmax_xent.forward(
        hidden, weight, np.where(targets == IGNORED, IGNORED, targets % len(weight)), **named
    )


def _scales_row_weights(*args: Any, row_weights: Any = None, **named: Any) -> Any:
    if row_weights is not None:
        row_weights /= named["normalizer"]
        named["normalizer"] = 1.0
    return softmax_xent.forward(*args, row_weights=row_weights, **named)


def _smoothing(change: Any) -> SimpleNamespace:
    """Return the operation that takes `change(ε, V)` for ε."""

    def forward(hidden: Any, weight: Any, *rest: Any, label_smoothing: float = 0.0, **named: Any) -> Any:
        if not 0 < label_smoothing < 1:
            return softmax_xent.forward(hidden, weight, *rest, label_smoothing=label_smoothing, **named)
        changed = change(label_smoothing, len(weight))
        return softmax_xent.forward(hidden, weight, *rest, label_smoothing=changed, **named)

    return _bug(forward=forward)


def _smooths_one(*, in_loss: bool) -> SimpleNamespace:
    def forward(*args: Any, label_smoothing: float = 0.0, **named: Any) -> Any:
        smoothed = softmax_xent.forward(*args, label_smoothing=label_smoothing, **named)
        plain = softmax_xent.forward(*args, **named)
        return (smoothed[0], plain[1]) if in_loss else (plain[0], smoothed[1])

    return _bug(forward=forward)


MUTANTS = {
    # (1 - ε) / C to every class in the place of ε / C
    "spreads_what_is_left": _smoothing(lambda smoothing, classes: 1 - smoothing),
    # ε / (C - 1) to the others, and none of it to the target
    "spreads_over_the_others": _smoothing(
        lambda smoothing, classes: min(0.999, smoothing * classes / max(1, classes - 1))
    ),
    "smooths_the_loss_alone": _smooths_one(in_loss=True),
    "smooths_the_gradient_alone": _smooths_one(in_loss=False),
    "forgets_the_onehot": _bug(forward=partial(_defined, change="onehot")),
    "forgets_the_row_weights_in_backward": _without("row_weights", in_loss=False),
    "forgets_the_normalizer_in_backward": _without("normalizer", in_loss=False),
    "averages_over_all_rows": _bug(forward=partial(_defined, change="all")),
    "forgets_the_bias": _without("bias", in_loss=True),
    "forgets_the_row_weights": _without("row_weights", in_loss=True),
    "counts_ignored_rows": _bug(forward=_counts_ignored),
    "keeps_the_last_chunk_of_dweight": _bug(forward=_last_chunk_of_dweight),
    "loses_the_last_chunk": _bug(forward=_loses_last_chunk),
    "multiplies_ignored_rows_by_zero": _bug(forward=partial(_defined, change="nothing")),
    "trains_ignored_rows": _bug(forward=_trains_ignored),
    "divides_by_the_counted_rows": _bug(forward=partial(_defined, change="counted")),
    "one_chunk": _bug(forward=lambda *a, **k: softmax_xent.forward(*a, **{**k, "chunk_bytes": 2**40})),
    "exponentiates_unshifted": _bug(forward=partial(_defined, change="unshifted")),
    "hands_out_zeros": _bug(backward=_hands_out_zeros),
    "trains_the_head_always": _bug(forward=_always_trains_head),
    "wraps_negative_targets": _bug(forward=_wrapping),
    "scales_row_weights_in_place": _bug(forward=_scales_row_weights),
    "no_barrier_before_a_narrow_store": _kernel_bug("if (sizeof(T) < sizeof(float)) __syncthreads();", ""),
    "no_barrier_between_the_warps": _kernel_bug("= part;\n    __syncthreads();", "= part;"),
    "onehot_of_the_next_class": _kernel_bug(
        "if (column + i == target) logits[i] -=", "if (column + i == target + 1) logits[i] -="
    ),
    "keeps_the_old_sum_at_a_new_maximum": _kernel_bug(
        "a.odds * exp2_approx((a.maximum - maximum) * LOG2_E)", "a.odds"
    ),
    "counts_what_is_past_the_row": _kernel_bug("logits[i] = -INFINITY", "logits[i] = 0.0f"),
    "forgets_the_bias_of_the_target": _kernel_bug(" + (bias_V ? widened(bias_V[target]) : 0.0f)", ""),
    "smooths_no_gradient": _kernel_bug("share * smoothing / V", "0.0f"),
    "scatters_to_its_own_place": _kernel_bug("(place_R[blockIdx.x]) * D", "(blockIdx.x) * D"),
    "scatter_leaves_the_end_out": _kernel_bug("if (column >= D) return;", "if (column + PACK > D) return;"),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS | MEASURED, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
