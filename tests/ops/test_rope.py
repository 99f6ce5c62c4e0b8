"""Attempts to falsify contracts/ops/rope.yaml."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.rope
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import rope
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_unchanged

CONTRACT = op_contract("rope")
IMPLEMENTATIONS = implementations(rope)
THETAS = (1e4, 1e6, 1e7)
EPS = 1e-6


class Case(NamedTuple):
    n: int
    h: int
    g: int
    p: int
    rest: int
    theta: float
    normed: bool
    texture: str
    seed: int

    @property
    def e(self) -> int:
        return 2 * self.p + self.rest

    def positions(self) -> np.ndarray:
        return np.random.default_rng(self.seed).integers(0, 2000, self.n)

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        arrays = {
            name: textured(rng, (self.n, heads, self.e), self.texture, dtype) for name, heads in self.heads
        }
        norms = {name: 0.5 * rng.standard_normal(self.e).astype(dtype) for name in ("q_norm", "k_norm")}
        return arrays | norms if self.normed else arrays

    @property
    def heads(self) -> tuple[tuple[str, int], tuple[str, int]]:
        return ("q", self.h), ("k", self.g)

    def angles(self, op: Any, positions: Any, dtype: str) -> dict[str, Any]:
        cos, sin = op.angles(positions, theta=self.theta, rotary_dim=2 * self.p, dtype=dtype)
        return {"cos": cos, "sin": sin}


CASES = st.builds(
    Case,
    *(st.integers(*CONTRACT.domain[axis]) for axis in ("N", "H", "G", "P", "rest")),
    st.sampled_from(THETAS),
    st.booleans(),
    textures,
    seeds,
)


def _exact(x: np.ndarray, norm: np.ndarray | None, positions: np.ndarray, case: Case) -> tuple[Any, Any]:
    """Return the float64 equation, element by element as it is written, and the sum of its absolute terms."""
    x = x.astype("float64")
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (1 + norm.astype("float64"))
    y, magnitude = x.copy(), np.abs(x)
    for j in range(case.p):
        angle = positions[:, None] * case.theta ** (-2 * j / (2 * case.p))
        a, b, c, s = x[..., j], x[..., j + case.p], np.cos(angle), np.sin(angle)
        y[..., j], y[..., j + case.p] = a * c - b * s, b * c + a * s
        # cos and sin are off by a rounding of 1, whatever their own size
        magnitude[..., j] = magnitude[..., j + case.p] = np.abs(a) + np.abs(b)
    return y, magnitude


@in_float64
def check_gradients(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays("float64")
    rng = np.random.default_rng(case.seed + 1)
    cotangents = tuple(rng.standard_normal(arrays[name].shape) for name in "qk")
    constants = {**case.angles(op, case.positions(), "float64"), "eps": 0.5}

    def forward(**inputs: Any) -> Any:
        return op.forward(**inputs, **constants)[0]

    grads = op.backward(op.forward(**arrays, **constants)[1], *cotangents, wants_norms=case.normed)
    assert_gradients(forward, arrays, cotangents, grads._asdict(), rng)
    assert (grads.q_norm is None) == (grads.k_norm is None) == (not case.normed)


def check_forward(op: Any, case: Case) -> None:
    positions = case.positions()
    for dtype, roundings in (("float32", case.e + 14), (bfloat16, 5)):
        arrays = case.arrays(dtype)
        outputs, _ = op.forward(**arrays, **case.angles(op, positions, "float32"), eps=EPS)
        for name, y in zip("qk", outputs, strict=True):
            assert y.dtype == dtype
            exact, magnitude = _exact(arrays[name], arrays.get(f"{name}_norm"), positions, case)
            assert_within(y, exact, magnitude, roundings, dtype)


@in_float64
def check_scores_depend_on_the_difference(op: Any, case: Case) -> None:
    case = case._replace(normed=False, texture="normal", g=case.h)
    arrays, positions = case.arrays("float64"), case.positions()
    arrays["k"] = arrays["k"][:1] + 0 * arrays["q"]  # one key for every query, moved along with it

    def scores(query_at: Any, key_at: Any) -> Any:
        (q, _), _ = op.forward(**arrays, **case.angles(op, query_at, "float64"))
        (_, k), _ = op.forward(**arrays, **case.angles(op, key_at, "float64"))
        return (q * k).sum(-1)

    here, moved = scores(positions + 5, positions), scores(positions + 47, positions + 42)
    np.testing.assert_allclose(moved, here, rtol=0, atol=1e-9 * case.e)
    at_origin = scores(0 * positions + 5, 0 * positions)
    np.testing.assert_allclose(here, at_origin, rtol=0, atol=1e-9 * case.e)


@in_float64
def check_length_is_kept(op: Any, case: Case) -> None:
    case = case._replace(normed=False)
    arrays = case.arrays("float64")
    outputs, _ = op.forward(**arrays, **case.angles(op, case.positions(), "float64"))
    for name, y in zip("qk", outputs, strict=True):
        length = np.linalg.norm(arrays[name], axis=-1)
        np.testing.assert_allclose(np.linalg.norm(y, axis=-1), length, rtol=1e-13, atol=1e-300)


def check_what_stays(op: Any, case: Case) -> None:
    case = case._replace(normed=False)
    arrays, positions = case.arrays("float32"), case.positions()
    at_zero, _ = op.forward(**arrays, **case.angles(op, 0 * positions, "float32"))
    elsewhere, _ = op.forward(**arrays, **case.angles(op, positions, "float32"))
    for name, y, z in zip("qk", at_zero, elsewhere, strict=True):
        np.testing.assert_array_equal(y, arrays[name])
        np.testing.assert_array_equal(z[..., 2 * case.p :], arrays[name][..., 2 * case.p :])


def check_angles(op: Any, case: Case) -> None:
    positions = np.concatenate([case.positions() * 524, [2**20]])
    cos, sin = op.angles(positions, theta=case.theta, rotary_dim=2 * case.p, dtype="float32")
    exponents = -np.arange(case.p, dtype=np.longdouble) / case.p
    angle = positions[:, None].astype(np.longdouble) * np.power(np.longdouble(case.theta), exponents)
    for found, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert found.shape == exact.shape
        assert found.dtype == "float32"
        assert np.abs(found - exact).max() <= 3 * np.finfo("float32").eps / 2


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = {**case.arrays("float32"), **case.angles(op, case.positions(), "float32")}
    cotangents = {f"d{name}": np.ones_like(arrays[name]) for name in "qk"}

    def run() -> None:
        outputs, saved = op.forward(**arrays, eps=EPS)
        op.backward(saved, cotangents["dq"], cotangents["dk"], wants_norms=case.normed)
        for y in outputs:
            y += 1  # the outputs must be the caller's own, no views of the inputs

    assert_unchanged(arrays | cotangents, run)


def check_agreement(op: Any, case: Case) -> None:
    if case.seed % 2:  # heads that kernels read by packs
        case = case._replace(p=8 * (1 + case.p % 4), rest=8 * (case.rest % 3))
    for dtype in (bfloat16, "float32"):
        arrays, rng = case.arrays(dtype), np.random.default_rng(case.seed + 1)
        arrays |= case.angles(op, case.positions(), "float32")
        exact = widened(arrays)
        dq, dk = (rng.standard_normal(arrays[name].shape).astype(dtype) for name in "qk")
        outputs, saved = op.forward(**arrays, eps=0.5)
        outputs_exact, saved_exact = rope.forward(**exact, eps=0.5)
        grads = op.backward(saved, dq, dk, wants_norms=case.normed)
        cotangents = dq.astype("float64"), dk.astype("float64")
        grads_exact = rope.backward(saved_exact, *cotangents, wants_norms=case.normed)
        turned_back = rope.backward(saved_exact._replace(q_normed=None, k_normed=None), *cotangents)
        for name, y, y_exact in zip("qk", outputs, outputs_exact, strict=True):
            assert_agrees(y, y_exact, name)
        for name, normed in (("q", saved_exact.q_normed), ("k", saved_exact.k_normed)):
            assert_agrees(getattr(grads, name), getattr(grads_exact, name), f"d{name}")
            if normed is not None:
                weight, exact_weight = (getattr(g, f"{name}_norm") for g in (grads, grads_exact))
                # the sum is over rows that were rounded to the dtype of q; terms may cancel in it
                dy = getattr(turned_back, name)
                rstd = normed.rstd.reshape(*dy.shape[:2], 1)
                terms = abs(dy * normed.stream.reshape(dy.shape) * rstd).sum(axis=(0, 1))
                assert_agrees(weight, exact_weight, f"d{name}_norm", dtype=dtype, terms=terms)


CHECKS = {
    "ROPE-001": check_gradients,
    "ROPE-002": check_forward,
    "ROPE-003": check_scores_depend_on_the_difference,
    "ROPE-004": check_length_is_kept,
    "ROPE-005": check_what_stays,
    "ROPE-006": check_angles,
    "ROPE-007": check_inputs_unchanged,
    "ROPE-008": check_agreement,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def test_odd_or_too_wide_rotations_are_refused() -> None:
    with pytest.raises(ShapeError, match="even"):
        rope.angles(np.arange(3), theta=1e4, rotary_dim=5, dtype="float32")
    cos, sin = rope.angles(np.arange(3), theta=1e4, rotary_dim=6, dtype="float32")
    with pytest.raises(ShapeError, match="6 of them"):
        rope.forward(np.ones((3, 1, 4)), np.ones((3, 1, 4)), cos, sin)


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"angles": rope.angles, "forward": rope.forward, "backward": rope.backward}
    return SimpleNamespace(**right | changes)


def _interleaved(q: Any, k: Any, cos: Any, sin: Any, *norms: Any, **scalars: Any) -> Any:
    def moved(x: Any) -> Any:
        half = cos.shape[1]
        pairs = np.concatenate([np.arange(0, 2 * half, 2), np.arange(1, 2 * half, 2)])
        return x[..., np.concatenate([pairs, np.arange(2 * half, x.shape[-1])])]

    return rope.forward(moved(q), moved(k), cos, sin, *norms, **scalars)


def _last_dimensions(q: Any, k: Any, cos: Any, sin: Any, *norms: Any, **scalars: Any) -> Any:
    reverse = [None if norm is None else norm[::-1] for norm in norms]
    (y_q, y_k), saved = rope.forward(q[..., ::-1], k[..., ::-1], cos, sin, *reverse, **scalars)
    return (y_q[..., ::-1], y_k[..., ::-1]), saved


def _plain_norms(
    q: Any, k: Any, cos: Any, sin: Any, q_norm: Any = None, k_norm: Any = None, **scalars: Any
) -> Any:
    norms = [None if norm is None else norm - 1 for norm in (q_norm, k_norm)]
    return rope.forward(q, k, cos, sin, *norms, **scalars)


def _keys_backwards(q: Any, k: Any, cos: Any, sin: Any, **rest: Any) -> Any:
    (y_q, _), saved = rope.forward(q, k, cos, sin, **rest)
    return (y_q, rope.forward(q, k, cos, -sin, **rest)[0][1]), saved


def _wrong_cross_term(q: Any, k: Any, cos: Any, sin: Any, **rest: Any) -> Any:
    (y_q, y_k), saved = rope.forward(q, k, cos, sin, **rest)
    half = cos.shape[1]
    y_q[..., half : 2 * half] -= 2 * q[..., :half] * sin[:, None]
    return (y_q, y_k), saved


def _without_norms(saved: Any, dq: Any, dk: Any, *, wants_norms: bool) -> Any:
    right = rope.backward(saved, dq, dk, wants_norms=wants_norms)
    plain = rope.backward(saved._replace(q_normed=None, k_normed=None), dq, dk)
    return right._replace(q=plain.q, k=plain.k)


def _one_head(saved: Any, dq: Any, dk: Any, *, wants_norms: bool) -> Any:
    first = dq.copy()
    first[:, 1:] = 0
    of_first = rope.backward(saved, first, dk, wants_norms=wants_norms)
    return rope.backward(saved, dq, dk, wants_norms=wants_norms)._replace(q_norm=of_first.q_norm)


def _float32_angles(positions: Any, *, theta: float, rotary_dim: int, dtype: Any) -> Any:
    exponents = -np.arange(0, rotary_dim, 2, dtype="float32") / np.float32(rotary_dim)
    angle = positions.astype("float32")[:, None] * np.float32(theta) ** exponents
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def _in_place(q: Any, k: Any, *rest: Any, **named: Any) -> Any:
    outputs, saved = rope.forward(q, k, *rest, **named)
    q[...] = outputs[0]
    return outputs, saved


MUTANTS = {
    "rotates_the_gradient_forward": _bug(
        backward=lambda saved, *d, **k: rope.backward(saved._replace(sin=-saved.sin), *d, **k)
    ),
    "ignores_the_norms_in_backward": _bug(backward=_without_norms),
    "norm_gradient_of_one_head": _bug(backward=_one_head),
    "interleaved_pairs": _bug(forward=_interleaved),
    "swaps_sin_and_cos": _bug(angles=lambda *a, **k: rope.angles(*a, **k)[::-1]),
    "rotates_the_last_dimensions": _bug(forward=_last_dimensions),
    "plain_norm_for_zero_centred": _bug(forward=_plain_norms),
    "rotates_keys_backwards": _bug(forward=_keys_backwards),
    "wrong_sign_of_the_cross_term": _bug(forward=_wrong_cross_term),
    "counts_positions_from_one": _bug(angles=lambda positions, **k: rope.angles(positions + 1, **k)),
    "angles_in_float32": _bug(angles=_float32_angles),
    "rotates_in_place": _bug(forward=_in_place),
    "stores_past_the_head": Emulated(
        lora.cuda.rope,
        ("rope.cu", "store_pack(b, y + P, j, P, packs);", "store_pack(b, y + P, j, P + 1, packs);"),
    ),
    "takes_any_head_for_packs": Emulated(lora.cuda.rope, ("rope.cu", " && P % L == 0", "")),
    "angles_of_the_head": Emulated(lora.cuda.rope, ("rope.cu", "head / H * P", "head % N * P")),
    "turns_back_as_forth": Emulated(lora.cuda.rope, ("rope.cu", "sine = sign * s[i]", "sine = s[i]")),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
