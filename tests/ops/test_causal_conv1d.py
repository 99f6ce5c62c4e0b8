"""Attempts to falsify contracts/ops/causal_conv1d.yaml."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import causal_conv1d
from tests.harness.bounds import assert_within, gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import implementations, tried
from tests.ops.observe import assert_refused, assert_unchanged, random_boundaries

CONTRACT = op_contract("causal_conv1d")
IMPLEMENTATIONS = implementations(causal_conv1d)


class Case(NamedTuple):
    s: int
    t: int
    d: int
    j: int
    continued: bool  # from a window
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        cu_seqlens = random_boundaries(rng, self.s, self.t)
        window = textured(rng, (self.s, self.j - 1, self.d), self.texture, dtype) if self.j > 1 else None
        return {
            "x": textured(rng, (int(cu_seqlens[-1]), self.d), self.texture, dtype),
            "weight": rng.standard_normal((self.d, 1, self.j)).astype(dtype),
            "cu_seqlens": cu_seqlens,
            "window": window if self.continued else None,
        }


CASES = st.builds(
    Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "STDJ"), st.booleans(), textures, seeds
)


def check_gradients(op: Any, case: Case) -> None:
    # at values of ten thousand silu is a kink, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays, rng = case.arrays("float64"), np.random.default_rng(case.seed + 1)
    dy = rng.standard_normal(arrays["x"].shape)

    def forward(**inputs: Any) -> Any:
        return op.forward(**{**arrays, **inputs})[0][0]

    saved = op.forward(**arrays)[1]
    grads = op.backward(saved, dy, wants_weight=True)
    inputs = {name: arrays[name] for name in ("x", "weight")}
    assert_gradients(forward, inputs, (dy,), grads._asdict(), rng)
    assert op.backward(saved, dy).weight is None


def _exact(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return y by the definition, a token at a time, and the sum of the absolute terms that silu is given."""
    x, taps = arrays["x"].astype("float64"), arrays["weight"][:, 0].T.astype("float64")
    y, magnitude = np.empty_like(x), np.empty_like(x)
    for s, (start, stop) in enumerate(pairwise(arrays["cu_seqlens"])):
        window = arrays["window"]
        before = np.zeros((len(taps) - 1, x.shape[1])) if window is None else window[s].astype("float64")
        rows = np.concatenate([before, x[start:stop]])
        for n in range(stop - start):
            terms = taps * rows[n : n + len(taps)]
            mixed = terms.sum(0)
            e = np.exp(-np.abs(mixed))
            y[start + n] = mixed * np.where(mixed >= 0, 1, e) / (1 + e)
            magnitude[start + n] = np.abs(terms).sum(0)
    return y, magnitude


def check_forward(op: Any, case: Case) -> None:
    for dtype, roundings in (("float32", case.j + 12), (bfloat16, 2)):
        arrays = case.arrays(dtype)
        (y, _), _ = op.forward(**arrays)
        assert y.dtype == dtype
        exact, magnitude = _exact(arrays)
        underflow = magnitude * float(np.finfo("float32").tiny) / gamma(roundings, dtype)
        # 1.1 is the steepest slope of silu
        assert_within(y, exact, 1.1 * magnitude + underflow, roundings, dtype)


def check_packed_alone_and_cut(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    (y, windows), _ = op.forward(**arrays)
    for s, (start, stop) in enumerate(pairwise(arrays["cu_seqlens"])):
        window = None if arrays["window"] is None else arrays["window"][s : s + 1]
        cut = start + (case.seed + s) % (stop - start)
        for a, b in ((start, cut), (cut, stop)):
            if a < b:
                part = {"x": arrays["x"][a:b], "cu_seqlens": np.array([0, b - a]), "window": window}
                (alone, window), _ = op.forward(**{**arrays, **part})
                np.testing.assert_array_equal(y[a:b], alone)
        np.testing.assert_array_equal(windows[s : s + 1], window)


def check_reach(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float32")
    last = int(arrays["cu_seqlens"][-1])
    n = last - 1 - case.seed % case.t
    moved = arrays["x"].copy()
    moved[n] += 3
    (before, _), _ = op.forward(**arrays)
    (after, _), _ = op.forward(**{**arrays, "x": moved})
    np.testing.assert_array_equal(after[:n], before[:n])
    np.testing.assert_array_equal(after[n + case.j :], before[n + case.j :])
    assert (after[n] != before[n]).any(), "a token does not see itself"


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    dy = np.ones_like(arrays["x"])

    def run() -> None:
        outputs, saved = op.forward(**arrays)
        op.backward(saved, dy, wants_weight=True)
        for y in outputs:
            y += 1  # the outputs must be the caller's own, no views of the inputs

    assert_unchanged({**arrays, "dy": dy}, run)


def check_refusals(op: Any, case: Case) -> None:
    arrays = case._replace(j=case.j + 1, d=case.d + 1, t=case.t + 1, continued=True).arrays("float32")
    cu_seqlens = arrays["cu_seqlens"]
    wrong = [
        {"x": arrays["x"][:, :-1]},
        {"x": arrays["x"][:-1]},
        {"weight": arrays["weight"][:1]},
        {"weight": np.repeat(arrays["weight"], 2, axis=1)},
        {"window": arrays["window"][:, :-1]},
        {"window": arrays["window"][..., :1]},
        {"window": np.repeat(arrays["window"], 2, axis=0)},
        {"cu_seqlens": np.append(1, cu_seqlens[1:])},
        {"cu_seqlens": np.append(cu_seqlens[:-1], cu_seqlens[-1] - 1)},
    ]
    for arguments in wrong:
        assert_refused(ShapeError, "expected x", partial(op.forward, **{**arrays, **arguments}))


CHECKS = {
    "CONV-001": check_gradients,
    "CONV-002": check_forward,
    "CONV-003": check_packed_alone_and_cut,
    "CONV-004": check_reach,
    "CONV-005": check_inputs_unchanged,
    "CONV-006": check_refusals,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": causal_conv1d.forward, "backward": causal_conv1d.backward}
    return SimpleNamespace(**right | changes)


def _with(**replaced: Any) -> SimpleNamespace:
    """Return the operation with arguments replaced by a function of all of them."""

    def forward(**arrays: Any) -> Any:
        return causal_conv1d.forward(**arrays | {name: change(arrays) for name, change in replaced.items()})

    return _bug(forward=forward)


def _looks_ahead(**arrays: Any) -> Any:
    (y, window), saved = causal_conv1d.forward(**arrays)
    y[:-1] += arrays["x"][1:] / 8
    return (y, window), saved


def _too_long(**arrays: Any) -> Any:
    (y, window), saved = causal_conv1d.forward(**arrays)
    taps = arrays["weight"].shape[-1]
    y[taps:] += arrays["x"][:-taps] / 8
    return (y, window), saved


def _without_silu(**arrays: Any) -> Any:
    outputs, saved = causal_conv1d.forward(**arrays)
    return (causal_conv1d._mixed(saved).astype(arrays["x"].dtype), outputs[1]), saved


def _one_sequence(arrays: dict[str, Any]) -> Any:
    return arrays["cu_seqlens"][[0, -1]]


def _leaking(*, window: Any, **arrays: Any) -> Any:
    (y, _), _ = causal_conv1d.forward(
        **{**arrays, "cu_seqlens": _one_sequence(arrays)}, window=None if window is None else window[:1]
    )
    (_, windows), saved = causal_conv1d.forward(**arrays, window=window)
    return (y, windows), saved


def _leaking_backward(saved: Any, dy: Any, **wants: Any) -> Any:
    grads = causal_conv1d.backward(saved, dy, **wants)
    rows = saved.padded[saved.slots]
    joined = causal_conv1d.forward(rows, saved.weight, np.array([0, len(rows)]))[1]
    return grads._replace(x=causal_conv1d.backward(joined, dy).x)


def _first_rows(**arrays: Any) -> Any:
    (y, window), saved = causal_conv1d.forward(**arrays)
    return (y, window[:, ::-1]), saved


def _without_slope(saved: Any, dy: Any, **wants: Any) -> Any:
    mixed = causal_conv1d._mixed(saved)
    open_ = 1 / (1 + np.exp(-mixed))
    return causal_conv1d.backward(saved, dy / (1 + mixed * (1 - open_)), **wants)


def _in_place(*, x: Any, **arrays: Any) -> Any:
    (y, window), saved = causal_conv1d.forward(x, **arrays)
    x[...] = y + 1
    return (y, window), saved


MUTANTS = {
    "flips_the_taps_in_backward": _bug(
        backward=lambda s, dy, **k: causal_conv1d.backward(s._replace(weight=s.weight[..., ::-1]), dy, **k)
    ),
    "forgets_the_slope_of_silu": _bug(backward=_without_slope),
    "leaks_backward_over_a_boundary": _bug(backward=_leaking_backward),
    "reverses_the_taps": _with(weight=lambda arrays: arrays["weight"][..., ::-1]),
    "looks_ahead": _bug(forward=_looks_ahead),
    "forgets_silu": _bug(forward=_without_silu),
    "drops_the_window": _with(window=lambda arrays: None),
    "leaks_over_a_boundary": _bug(forward=_leaking),
    "returns_the_first_rows": _bug(forward=_first_rows),
    "remembers_too_long": _bug(forward=_too_long),
    "activates_in_place": _bug(forward=_in_place),
    "ignores_the_rest": _with(cu_seqlens=lambda a: np.append(a["cu_seqlens"][:-1], len(a["x"]))),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
