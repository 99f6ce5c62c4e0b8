"""Attempts to falsify contracts/ops/lowrank_linear.yaml."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import lowrank_linear
from lora.ops.lowrank_linear import Factors, Part
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.gradcheck import assert_gradients
from tests.ops.observe import assert_refused, assert_unchanged, peak_bytes

CONTRACT = op_contract("lowrank_linear")
IMPLEMENTATIONS = [lowrank_linear]


class Kind(NamedTuple):
    """What one part of a case has."""

    o: int
    r: int
    adapted: bool
    biased: bool
    trained: bool


class Case(NamedTuple):
    n: int
    i: int
    kinds: tuple[Kind, ...]
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> tuple[np.ndarray, tuple[Part, ...]]:
        """Return x and the parts; weights in `dtype`, factors in float32 or float64 as in training."""
        rng = np.random.default_rng(self.seed)
        x = textured(rng, (self.n, self.i), self.texture, dtype)
        return x, tuple(_part(rng, kind, self.i, dtype) for kind in self.kinds)

    def cotangents(self, dtype: str = "float64") -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(self.seed + 1)
        return tuple(rng.standard_normal((self.n, kind.o)).astype(dtype) for kind in self.kinds)


def _part(rng: np.random.Generator, kind: Kind, i: int, dtype: Any) -> Part:
    master = "float64" if dtype == "float64" else "float32"
    weight, bias = rng.standard_normal((kind.o, i)).astype(dtype), rng.standard_normal(kind.o).astype(dtype)
    a, b = (
        rng.standard_normal((kind.r, i)).astype(master),
        rng.standard_normal((kind.o, kind.r)).astype(master),
    )
    factors = Factors(a, b, float(rng.choice([0.5, 2.0, 3.7])))
    return Part(weight, bias if kind.biased else None, factors if kind.adapted else None, kind.trained)


_AXES = CONTRACT.domain
KINDS = st.builds(
    Kind, st.integers(*_AXES["O"]), st.integers(*_AXES["R"]), st.booleans(), st.booleans(), st.booleans()
)
CASES = st.builds(
    Case,
    st.integers(*_AXES["N"]),
    st.integers(*_AXES["I"]),
    st.lists(KINDS, min_size=_AXES["P"][0], max_size=_AXES["P"][1]).map(tuple),
    textures,
    seeds,
)


def _named(x: Any, parts: tuple[Part, ...]) -> dict[str, Any]:
    """Return every array of a call by name."""
    arrays = {"x": x}
    for p, part in enumerate(parts):
        arrays |= {f"{p}.weight": part.weight, f"{p}.bias": part.bias}
        arrays |= {f"{p}.a": part.factors.a, f"{p}.b": part.factors.b} if part.factors else {}
    return arrays


def _parts_with(parts: tuple[Part, ...], arrays: dict[str, Any]) -> tuple[Part, ...]:
    """Return `parts` with the arrays that `arrays` names in their places."""
    changed = []
    for p, part in enumerate(parts):
        own = {key: arrays[f"{p}.{key}"] for key in ("a", "b", "weight", "bias") if f"{p}.{key}" in arrays}
        factors = {key: own.pop(key) for key in ("a", "b") if key in own}
        changed.append(
            part._replace(**own, **({"factors": part.factors._replace(**factors)} if factors else {}))
        )
    return tuple(changed)


def _check_gradients(op: Any, case: Case, of: tuple[str, ...]) -> None:
    # the difference of two outputs of ten thousand has lost the digits that it is judged by
    case = case._replace(texture="normal") if case.texture == "large" else case
    x, parts = case.arrays("float64")
    dys = case.cotangents()
    grads = op.backward(op.forward(x, parts)[1], dys)
    found = {"x": grads.x}
    for p, part_grads in enumerate(grads.parts):
        found |= {f"{p}.{name}": grad for name, grad in part_grads._asdict().items()}
    differentiable = {
        name: array
        for name, array in _named(x, parts).items()
        if name.split(".")[-1] in of and array is not None
    }
    frozen = {
        f"{p}.{name}" for p, kind in enumerate(case.kinds) if not kind.trained for name in ("weight", "bias")
    }
    inputs = {name: array for name, array in differentiable.items() if name not in frozen}

    def forward(**arrays: Any) -> Any:
        return op.forward(arrays.get("x", x), _parts_with(parts, arrays))[0]

    assert_gradients(forward, inputs, dys, found, np.random.default_rng(case.seed + 2))
    absent = [name for name in found if name not in _named(x, parts) or name in frozen]
    assert all(found[name] is None for name in absent), f"gradients of what is not trained: {absent}"


def check_factor_gradients(op: Any, case: Case) -> None:
    _check_gradients(op, case, of=("x", "a", "b"))


def check_trained_gradients(op: Any, case: Case) -> None:
    _check_gradients(op, case, of=("weight", "bias"))


def check_forward(op: Any, case: Case) -> None:
    for dtype in ("float32", bfloat16):
        x, parts = case.arrays(dtype)
        ys, _ = op.forward(x, parts)
        for kind, part, y in zip(case.kinds, parts, ys, strict=True):
            assert (y.dtype, y.shape) == (dtype, (case.n, kind.o))
            exact, magnitude = (_equation(transform, x, part) for transform in (np.array, np.abs))
            roundings = case.i + kind.r + 6 if dtype == "float32" else 2
            assert_within(y, exact, magnitude, roundings, dtype)


def _equation(transform: Any, x: Any, part: Part) -> Any:
    """Return y in float64, or with `transform` = abs the sum of its absolute terms."""
    x, weight = transform(x.astype("float64")), transform(part.weight.astype("float64"))
    y = x @ weight.T
    if part.bias is not None:
        y = y + transform(part.bias.astype("float64"))
    if part.factors is not None:
        a, b = (transform(factor.astype("float64")) for factor in part.factors[:2])
        y = y + part.factors.scale * (x @ a.T @ b.T)
    return y


def check_zero_b_is_the_base(op: Any, case: Case) -> None:
    x, parts = case.arrays("float32")
    zeroed = tuple(
        p._replace(factors=p.factors._replace(b=np.zeros_like(p.factors.b))) if p.factors else p
        for p in parts
    )
    base = tuple(p._replace(factors=None) for p in parts)
    for y, expected in zip(op.forward(x, zeroed)[0], op.forward(x, base)[0], strict=True):
        np.testing.assert_array_equal(y, expected)


def check_frozen_gradient_is_never_formed(op: Any, case: Case) -> None:
    wide_parts = tuple(kind._replace(o=512, adapted=True, trained=False) for kind in case.kinds)
    case = case._replace(n=min(case.n, 9), i=512, kinds=wide_parts)
    x, parts = case.arrays("float32")
    saved, dys = op.forward(x, parts)[1], case.cotangents("float32")
    assert peak_bytes(lambda: op.backward(saved, dys)) < parts[0].weight.nbytes / 2


def check_nothing_unwanted(op: Any, case: Case) -> None:
    x, parts = case.arrays("float32")
    saved, dys = op.forward(x, parts)[1], case.cotangents("float32")
    needed = any(kind.adapted or kind.trained for kind in case.kinds)
    assert (saved.x is not None) == needed
    full, without = op.backward(saved, dys), op.backward(saved, dys, wants_x=False)
    assert without.x is None
    for part, expected in zip(without.parts, full.parts, strict=True):
        for grad, same in zip(part, expected, strict=True):
            np.testing.assert_array_equal(grad, same)


def check_together_equals_alone(op: Any, case: Case) -> None:
    x, parts = case.arrays("float64")
    dys = case.cotangents()
    ys, saved = op.forward(x, parts)
    grads = op.backward(saved, dys)
    dx = np.zeros_like(x)
    for part, y, dy, part_grads in zip(parts, ys, dys, grads.parts, strict=True):
        (alone,), saved_alone = op.forward(x, (part,))
        grads_alone = op.backward(saved_alone, (dy,))
        np.testing.assert_allclose(y, alone, rtol=1e-12, atol=1e-9)
        for found, expected in zip(part_grads, grads_alone.parts[0], strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)
        dx += grads_alone.x
    np.testing.assert_allclose(grads.x, dx, rtol=1e-12, atol=1e-9)


def check_inputs_unchanged(op: Any, case: Case) -> None:
    x, parts = case.arrays("float32")
    dys = case.cotangents("float32")
    named = _named(x, parts) | {f"dy{p}": dy for p, dy in enumerate(dys)}
    assert_unchanged(named, lambda: op.backward(op.forward(x, parts)[1], dys))


def check_refusals(op: Any, case: Case) -> None:
    kinds = tuple(kind._replace(o=kind.o + 1, r=kind.r + 1, adapted=True, biased=True) for kind in case.kinds)
    case = case._replace(i=case.i + 1, kinds=kinds)
    x, parts = case.arrays("float32")
    last = len(parts) - 1
    bias, a, b = parts[last].bias, parts[last].factors.a, parts[last].factors.b
    wrong = [
        {f"{last}.bias": bias[:1]},
        {f"{last}.weight": parts[last].weight[:, :1]},
        {f"{last}.a": a[:, :1]},
        {f"{last}.a": a[:1]},
        {f"{last}.b": b[:1]},
        {f"{last}.b": b[:, :1]},
    ]
    for arrays in wrong:
        assert_refused(ShapeError, f"part {last}", partial(op.forward, x, _parts_with(parts, arrays)))


CHECKS = {
    "LOWRANK-001": check_factor_gradients,
    "LOWRANK-002": check_trained_gradients,
    "LOWRANK-003": check_forward,
    "LOWRANK-004": check_zero_b_is_the_base,
    "LOWRANK-005": check_frozen_gradient_is_never_formed,
    "LOWRANK-006": check_nothing_unwanted,
    "LOWRANK-007": check_together_equals_alone,
    "LOWRANK-008": check_inputs_unchanged,
    "LOWRANK-009": check_refusals,
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": lowrank_linear.forward, "backward": lowrank_linear.backward}
    return SimpleNamespace(**right | changes)


def _with_scale_one(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(p._replace(factors=p.factors._replace(scale=1.0)) if p.factors else p for p in parts)


def _without_factors(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(p._replace(factors=None) for p in parts)


def _gradients_from(change: Any, *names: str) -> SimpleNamespace:
    """Return the operation with the gradients `names` taken from a backward over `change`d parts."""

    def backward(saved: Any, dys: Any, **wants: Any) -> Any:
        right = lowrank_linear.backward(saved, dys, **wants)
        wrong = lowrank_linear.backward(saved._replace(parts=change(saved.parts)), dys, **wants)
        parts = tuple(
            r._replace(**{name: getattr(w, name) for name in names if name != "x"})
            for r, w in zip(right.parts, wrong.parts, strict=True)
        )
        return right._replace(x=wrong.x if "x" in names else right.x, parts=parts)

    return _bug(backward=backward)


def _over(change: Any) -> SimpleNamespace:
    """Return the operation with `change`d parts in the forward, and the right ones saved."""

    def forward(x: Any, parts: Any) -> Any:
        ys, _ = lowrank_linear.forward(x, change(parts))
        return ys, lowrank_linear.forward(x, parts)[1]

    return _bug(forward=forward)


def _beside_the_base(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(
        p._replace(factors=p.factors._replace(b=p.factors.b + 1e-4)) if p.factors else p for p in parts
    )


def _forms_frozen_gradient(saved: Any, dys: Any, **wants: Any) -> Any:
    grads = lowrank_linear.backward(saved, dys, **wants)
    for dy in dys:
        np.matmul(dy.T, saved.x)
    return grads


def _trains_frozen(saved: Any, dys: Any, **wants: Any) -> Any:
    grads = lowrank_linear.backward(saved, dys, **wants)
    with_weights = zip(grads.parts, saved.parts, strict=True)
    return grads._replace(parts=tuple(g._replace(weight=np.zeros_like(p.weight)) for g, p in with_weights))


def _swapped(x: Any, parts: Any) -> Any:
    ys, saved = lowrank_linear.forward(x, parts)
    return ys[::-1], saved


def _da_reversed(saved: Any, dys: Any, **wants: Any) -> Any:
    grads = lowrank_linear.backward(saved, dys, **wants)
    das = iter([p.a for p in grads.parts if p.a is not None][::-1])
    return grads._replace(parts=tuple(p._replace(a=next(das)) if p.a is not None else p for p in grads.parts))


def _averaged_bias(saved: Any, dys: Any, **wants: Any) -> Any:
    grads = lowrank_linear.backward(saved, dys, **wants)
    return grads._replace(
        parts=tuple(p._replace(bias=p.bias / len(dys[0])) if p.bias is not None else p for p in grads.parts)
    )


def _scales_b(x: Any, parts: Any) -> Any:
    for part in parts:
        if part.factors:
            np.multiply(part.factors.b, part.factors.scale, out=part.factors.b)
    return lowrank_linear.forward(x, _with_scale_one(parts))


def _broadcasting(x: Any, parts: Any) -> Any:
    stretched = tuple(p._replace(bias=np.broadcast_to(p.bias, len(p.weight))) for p in parts)
    return lowrank_linear.forward(x, stretched)


MUTANTS = {
    "forgets_the_scale_in_da": _gradients_from(_with_scale_one, "a"),
    "forgets_the_scale_in_db": _gradients_from(_with_scale_one, "b"),
    "forgets_the_branch_in_dx": _bug(
        backward=lambda s, dys, **k: lowrank_linear.backward(s, dys, **k)._replace(
            x=lowrank_linear.backward(s._replace(parts=_without_factors(s.parts)), dys).x
        )
    ),
    "forgets_a_part_in_dx": _bug(
        backward=lambda s, dys, **k: lowrank_linear.backward(s, dys, **k)._replace(
            x=lowrank_linear.backward(s, (*dys[:-1], 0 * dys[-1])).x
        )
    ),
    "trains_the_frozen": _bug(backward=_trains_frozen),
    "averages_the_bias_gradient": _bug(backward=_averaged_bias),
    "forgets_the_scale_in_y": _over(_with_scale_one),
    "forgets_the_bias": _over(lambda parts: tuple(p._replace(bias=None) for p in parts)),
    "swaps_the_parts": _bug(forward=_swapped),
    "starts_beside_the_base": _over(_beside_the_base),
    "forms_the_frozen_gradient": _bug(backward=_forms_frozen_gradient),
    "keeps_x_always": _bug(
        forward=lambda x, parts: (
            lowrank_linear.forward(x, parts)[0],
            lowrank_linear.forward(x, parts)[1]._replace(x=x),
        )
    ),
    "forms_dx_always": _bug(backward=lambda s, dys, wants_x=True: lowrank_linear.backward(s, dys)),
    "deals_da_in_reverse": _bug(backward=_da_reversed),
    "scales_b_in_place": _bug(forward=_scales_b),
    "broadcasts_the_bias": _bug(forward=_broadcasting),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
