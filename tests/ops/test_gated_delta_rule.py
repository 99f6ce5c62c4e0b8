"""Attempts to falsify contracts/ops/gated_delta_rule.yaml."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.host.gated_delta_rule
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.host.unit_lower_inverse import unit_lower_inverse
from lora.ops import gated_delta_rule
from tests.harness.bounds import gamma
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.gradcheck import assert_gradients
from tests.ops import delta_recurrence
from tests.ops.observe import assert_refused, assert_unchanged, random_boundaries

CONTRACT = op_contract("gated_delta_rule")


def _module(name: str = "", of: Any = gated_delta_rule, **changes: Any) -> SimpleNamespace:
    """Return the functions of the module `of`, running with names of it changed."""

    def patched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **scalars: Any) -> Any:
            with patch.multiple(of, **changes):
                return function(*args, **scalars)

        return run

    functions = {name: patched(getattr(of, name)) for name in ("forward", "backward")}
    return SimpleNamespace(__name__=name, **functions)


# chunks of five tokens, one sequence or head at a time: short sequences then meet every kind of boundary
IMPLEMENTATIONS = [
    gated_delta_rule,
    _module("gated_delta_rule in small chunks", CHUNK=5, STEP_ELEMENTS=1),
    lora.host.gated_delta_rule,
    _module(
        "lora.host.gated_delta_rule in small chunks", lora.host.gated_delta_rule, CHUNK=5, TASK_ELEMENTS=1
    ),
]


class Case(NamedTuple):
    s: int
    t: int
    g: int
    m: int
    k: int
    w: int
    continued: bool  # from an initial state
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        cu_seqlens = random_boundaries(rng, self.s, self.t)
        n, h, master = int(cu_seqlens[-1]), self.g * self.m, "float64" if dtype == "float64" else "float32"
        shapes = {
            "q": (n, self.g, self.k),
            "k": (n, self.g, self.k),
            "v": (n, h, self.w),
            "a": (n, h),
            "b": (n, h),
        }
        arrays = {name: textured(rng, shape, self.texture, dtype) for name, shape in shapes.items()}
        arrays |= {name: rng.standard_normal(h).astype(master) for name in ("A_log", "dt_bias")}
        state = rng.standard_normal((self.s, h, self.k, self.w)).astype(master)
        return arrays | {"cu_seqlens": cu_seqlens, "initial_state": state if self.continued else None}

    def cotangents(self, dtype: str = "float64") -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed + 1)
        n, h = int(self.arrays("float64")["cu_seqlens"][-1]), self.g * self.m
        shapes = (n, h, self.w), (self.s, h, self.k, self.w)
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)  # type: ignore[return-value]

    @property
    def calm(self) -> Case:
        """The case without values of ten thousand: their gates are steps, sums of their decays inexact."""
        return self._replace(texture="normal") if self.texture == "large" else self


CASES = st.builds(
    Case, *(st.integers(*CONTRACT.domain[axis]) for axis in "STGMKW"), st.booleans(), textures, seeds
)


def _differentiable(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name != "cu_seqlens" and array is not None}


def _assert_close(found: Any, exact: Any, relative: float) -> None:
    scale = 1 + np.abs(exact).max(initial=0)
    assert np.abs(found - exact).max(initial=0) <= relative * scale, np.abs(found - exact).max() / scale


def check_equals_the_recurrence(op: Any, case: Case) -> None:
    arrays = case.calm.arrays("float64")
    (o, state), _ = op.forward(**arrays, wants_state=True)
    exact_o, exact_state, _ = delta_recurrence.forward(arrays)
    _assert_close(o, exact_o, 1e-12)
    _assert_close(state, exact_state, 1e-12)
    (same, unwanted), _ = op.forward(**arrays)
    np.testing.assert_array_equal(same, o)
    assert unwanted is None


def check_gradients_of_the_recurrence(op: Any, case: Case) -> None:
    arrays, (do, dstate) = case.calm.arrays("float64"), case.calm.cotangents()
    saved = op.forward(**arrays, wants_state=True)[1]
    for last in (dstate, None):
        grads = op.backward(saved, do, last, wants_decay=True)._asdict()
        exact = delta_recurrence.backward(arrays, do, 0 * dstate if last is None else last)
        assert (grads["initial_state"] is None) == (not case.continued)
        for name in _differentiable(arrays):
            _assert_close(grads[name], exact[name], 1e-12)
    frozen = op.backward(saved, do, dstate)
    assert frozen.A_log is None
    assert frozen.dt_bias is None


def check_gradients(op: Any, case: Case) -> None:
    # a key of zero length has the curvature of its norm's eps, which no difference can follow
    case = case.calm._replace(texture="normal", k=case.k + 1, t=1 + case.t // 2)
    arrays, cotangents = case.arrays("float64"), case.cotangents()
    inputs = _differentiable(arrays)

    def forward(**inputs: Any) -> Any:
        return op.forward(**{**arrays, **inputs}, wants_state=True)[0]

    saved = op.forward(**arrays, wants_state=True)[1]
    grads = op.backward(saved, *cotangents, wants_decay=True)._asdict()
    # short keys bend their norm within the step of the difference
    rng = np.random.default_rng(case.seed + 2)
    lengths = min(float(np.linalg.norm(arrays[name], axis=-1).min()) for name in "qk")
    assert_gradients(forward, inputs, cotangents, grads, rng, tolerance=1e-7 * max(1, 0.3 / lengths) ** 5)


def check_packed_alone_and_cut(op: Any, case: Case) -> None:
    case = case.calm
    arrays = case.arrays("float64")
    tokens, initial = {name: arrays[name] for name in ("q", "k", "v", "a", "b")}, arrays["initial_state"]
    decay = {name: arrays[name] for name in ("A_log", "dt_bias")}
    (o, states), _ = op.forward(**arrays, wants_state=True)
    for s, (start, stop) in enumerate(pairwise(arrays["cu_seqlens"])):
        state, cut = None if initial is None else initial[s : s + 1], start + (case.seed + s) % (stop - start)
        for a, b in ((start, cut), (cut, stop)):
            if a < b:
                part = {name: array[a:b] for name, array in tokens.items()}
                part |= decay | {"cu_seqlens": np.array([0, b - a]), "initial_state": state}
                (alone, state), _ = op.forward(**part, wants_state=True)
                _assert_close(o[a:b], alone, 1e-12)
        _assert_close(states[s : s + 1], state, 1e-12)


def check_causality(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float32")
    last = int(arrays["cu_seqlens"][-1])
    changed_at = last - 1 - case.seed % case.t
    (before, _), _ = op.forward(**arrays)
    for name in "qkvab":
        moved = arrays[name].copy()
        moved[changed_at] += 3
        (after, _), _ = op.forward(**{**arrays, name: moved})
        np.testing.assert_array_equal(after[:changed_at], before[:changed_at])
        if name == "v":
            assert (after[changed_at] != before[changed_at]).any(), "a token does not see its own value"


def check_rounding(op: Any, case: Case) -> None:
    for dtype in ("float32", bfloat16):
        arrays = case._replace(continued=True).arrays(dtype)
        # a token that empties the state must not blur the weak decays that follow it
        arrays["a"][np.random.default_rng(case.seed).random(len(arrays["a"])) < 0.05] = 1e4
        (o, state), _ = op.forward(**arrays, wants_state=True)
        assert (o.dtype, state.dtype) == (dtype, "float32")
        exact_o, exact_state, _ = delta_recurrence.forward(arrays)
        q, _, _, beta = delta_recurrence.gates(arrays)
        relative = gamma(case.t * (case.k + 12), "float32")
        for s, (start, stop) in enumerate(pairwise(arrays["cu_seqlens"])):
            written = beta[start:stop] * np.linalg.norm(arrays["v"][start:stop].astype("float64"), axis=-1)
            first = np.linalg.norm(arrays["initial_state"][s].astype("float64"), axis=(-2, -1))
            held = first + np.cumsum(
                written, axis=0
            )  # [T, H] at most this long is the state after each token
            assert (np.linalg.norm(state[s] - exact_state[s], axis=(-2, -1)) <= relative * held[-1]).all()
            error = np.linalg.norm(o[start:stop].astype("float64") - exact_o[start:stop], axis=-1)
            bound = relative * held * (np.linalg.norm(q[start:stop], axis=-1) + 1e-30)
            if dtype == bfloat16:
                bound += 2**-8 * np.linalg.norm(exact_o[start:stop], axis=-1)
            assert (error <= bound + 1e-37).all(), f"error {(error / (bound + 1e-37)).max()} bounds"


def check_extremes(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float32")
    rng = np.random.default_rng(case.seed)
    arrays["k"][rng.random(len(arrays["k"])) < 0.3] = 0
    arrays["a"] = rng.choice(np.float32([-1e4, -30, 30, 1e4]), arrays["a"].shape)
    arrays["b"] = rng.choice(np.float32([-1e4, 0, 1e4]), arrays["b"].shape)
    arrays["A_log"] += 3
    (o, state), saved = op.forward(**arrays, wants_state=True)
    grads = op.backward(saved, *case.cotangents("float32"), wants_decay=True)
    found = {"o": o, "state": state} | grads._asdict()
    assert all(np.isfinite(array).all() for array in found.values() if array is not None)


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays, (do, dstate) = case.arrays("float32"), case.cotangents("float32")

    def run() -> None:
        (o, state), saved = op.forward(**arrays, wants_state=True)
        op.backward(saved, do, dstate, wants_decay=True)
        o += 1
        state += 1

    assert_unchanged({**arrays, "do": do, "dstate": dstate}, run)


def check_refusals(op: Any, case: Case) -> None:
    case = case._replace(m=case.m + 1, k=case.k + 1, w=case.w + 1, t=case.t + 1, continued=True)
    arrays = case.arrays("float32")
    cu_seqlens = arrays["cu_seqlens"]
    wrong: list[dict[str, Any]] = [{name: arrays[name][..., :-1]} for name in ("q", "k", "A_log", "dt_bias")]
    wrong += [{name: arrays[name][:-1]} for name in ("q", "k", "v", "a", "b", "initial_state")]
    wrong += [{name: arrays[name][:, :1]} for name in ("v", "a", "b", "initial_state")]
    wrong += [{name: np.repeat(arrays[name], 2 * case.m, axis=1) for name in "qk"}]
    wrong += [{"cu_seqlens": np.append(cu_seqlens[:-1], cu_seqlens[-1] - 1)}]
    wrong += [{"cu_seqlens": np.append(1, cu_seqlens[1:])}]
    for arguments in wrong:
        assert_refused(ShapeError, "do not fit", partial(op.forward, **{**arrays, **arguments}))


CHECKS = {
    "GDR-001": check_equals_the_recurrence,
    "GDR-002": check_gradients_of_the_recurrence,
    "GDR-003": check_gradients,
    "GDR-004": check_packed_alone_and_cut,
    "GDR-005": check_causality,
    "GDR-006": check_rounding,
    "GDR-007": check_extremes,
    "GDR-008": check_inputs_unchanged,
    "GDR-009": check_refusals,
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


def test_a_chunk_of_like_keys_is_inverted_without_an_error() -> None:
    # by powers of L, which cancel down from 10^18, no digit would be right
    size = 61
    lower = np.tri(size, k=-1, dtype="float32")
    inverse = unit_lower_inverse(-lower[None])[0]
    np.testing.assert_array_equal(inverse, np.eye(size) - np.eye(size, k=-1))


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": gated_delta_rule.forward, "backward": gated_delta_rule.backward}
    return SimpleNamespace(**right | changes)


def _recurrence_with(bug: str) -> SimpleNamespace:
    """Return the operation with its outputs taken from the recurrence with `bug` in it."""

    def forward(*, wants_state: bool = False, **arrays: Any) -> Any:
        _, saved = gated_delta_rule.forward(**arrays)
        o, state, _ = delta_recurrence.forward(arrays, bug)
        state = state.astype(arrays["A_log"].dtype) if wants_state else None
        return (o.astype(arrays["v"].dtype), state), saved

    return _bug(forward=forward)


def _changed_chunk(change: Callable[..., Any]) -> SimpleNamespace:
    """Return the operation with `change` applied to every chunk; it is given the chunk's tokens too."""
    right = gated_delta_rule._chunk
    return _module(_chunk=lambda now, *, meets: change(now, right(now, meets=meets)))


def _unmasked(now: Any, chunk: Any) -> Any:
    total = np.cumsum(now.g, axis=-2)
    decay = np.exp(total - total.swapaxes(-1, -2))
    return chunk._replace(scores=np.matmul(now.q, now.k.swapaxes(-1, -2)) * decay)


def _masked_late(now: Any, chunk: Any) -> Any:
    total = np.cumsum(now.g, axis=-2)
    decay = np.exp(total - total.swapaxes(-1, -2)) * np.tri(total.shape[-2], dtype=total.dtype)
    return chunk._replace(scores=np.matmul(now.q, now.k.swapaxes(-1, -2)) * decay)


def _summed_in_storage(now: Any, chunk: Any) -> Any:
    total = np.cumsum(now.g, axis=-2)
    decay = np.exp(np.minimum(total - total.swapaxes(-1, -2), 0)) * np.tri(total.shape[-2], dtype=total.dtype)
    return chunk._replace(scores=np.matmul(now.q, now.k.swapaxes(-1, -2)) * decay)


_RETREAT, _MADE = gated_delta_rule._retreat, gated_delta_rule._made


def _state_dropped(*args: Any) -> Any:
    grads, dmet = _RETREAT(*args)
    return grads, None if dmet is None else 0 * dmet


def _state_rounded(*args: Any) -> Any:
    made = _MADE(*args)
    return made.astype(bfloat16).astype(made.dtype)


def _one_value_head(saved: Any, do: Any, dstate: Any, **wants: Any) -> Any:
    grads = gated_delta_rule.backward(saved, do, dstate, **wants)
    groups = saved.k.shape[1]
    firsts = [None if array is None else array.copy() for array in (do, dstate)]
    for array in firsts:
        if array is not None:
            array.reshape(len(array), groups, -1, *array.shape[2:])[:, :, 1:] = 0
    return grads._replace(k=gated_delta_rule.backward(saved, *firsts).k)


def _without_factor(name: str, factor: Callable[[Any], Any]) -> SimpleNamespace:
    def backward(saved: Any, *args: Any, **wants: Any) -> Any:
        grads = gated_delta_rule.backward(saved, *args, **wants)
        return grads._replace(**{name: getattr(grads, name) / factor(saved)})

    return _bug(backward=backward)


def _longest_first(**arguments: Any) -> Any:
    (o, state), saved = gated_delta_rule.forward(**arguments)
    order = np.argsort(-np.diff(arguments["cu_seqlens"]), kind="stable")
    return (o, state if state is None else state[order]), saved


def _normalising(**arguments: Any) -> Any:
    arguments["k"][...] = delta_recurrence.unit(arguments["k"]) / 2
    return gated_delta_rule.forward(**arguments)


def _moving_the_state(**arguments: Any) -> Any:
    (o, state), saved = gated_delta_rule.forward(**arguments)
    if arguments["initial_state"] is not None:
        arguments["initial_state"][...] = state
    return (o, state), saved


def _ignoring_the_rest(**arguments: Any) -> Any:
    arguments["cu_seqlens"] = np.append(arguments["cu_seqlens"][:-1], len(arguments["v"]))
    return gated_delta_rule.forward(**arguments)


FORWARD_BUGS = (
    "decays_after_the_read",
    "reads_before_the_write",
    "adds_without_correcting",
    "misses_the_l2_norm",
    "forgets_the_query_scale",
    "interleaves_the_heads",
    "rectifies_the_decay",
    "leaks_the_state",
    "drops_the_initial_state",
)
MUTANTS = {bug: _recurrence_with(bug) for bug in FORWARD_BUGS} | {
    "unmasked_decay": _changed_chunk(_unmasked),
    "masks_after_the_exponential": _changed_chunk(_masked_late),
    "sums_decays_in_float32": _changed_chunk(_summed_in_storage),
    "divides_by_the_length": _module(L2_EPS=0.0),
    "forgets_the_projection": _module(_through_unit=lambda x, dy: gated_delta_rule._rstd(x) * dy),
    "drops_the_state_gradient": _module(_retreat=_state_dropped),
    "gradient_of_one_value_head": _bug(backward=_one_value_head),
    "beta_gradient_without_sigmoid": _without_factor(
        "b", lambda s: delta_recurrence.logistic(s.b) * (1 - delta_recurrence.logistic(s.b))
    ),
    "decay_gradient_without_softplus": _without_factor(
        "a", lambda s: delta_recurrence.logistic(s.a + s.dt_bias)
    ),
    "states_longest_first": _bug(forward=_longest_first),
    "state_in_bfloat16": _module(_made=_state_rounded),
    "normalises_in_place": _bug(forward=_normalising),
    "moves_the_initial_state": _bug(forward=_moving_the_state),
    "ignores_the_rest": _bug(forward=_ignoring_the_rest),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
