"""Attempts to falsify contracts/ops/lowrank_linear.yaml."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.lowrank_linear
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import lowrank_linear
from lora.ops.lowrank_linear import Factors, Part, PartGrads
from tests.harness.agreement import assert_agrees, widened
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_refused, assert_unchanged, peak_bytes

CONTRACT = op_contract("lowrank_linear")
IMPLEMENTATIONS = implementations(lowrank_linear)
EMULATED = [op for op in IMPLEMENTATIONS if isinstance(op, Emulated)]


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

    def cotangents(self, dtype: Any = "float64") -> tuple[np.ndarray, ...]:
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


@in_float64
def check_factor_gradients(op: Any, case: Case) -> None:
    _check_gradients(op, case, of=("x", "a", "b"))


@in_float64
def check_trained_gradients(op: Any, case: Case) -> None:
    _check_gradients(op, case, of=("weight", "bias"))


def check_forward(op: Any, case: Case) -> None:
    # on tensor cores A, B, x Aᵀ and the correction are rounded too; the sums are float32
    narrow = 2 if op is lowrank_linear else 6
    for dtype in ("float32", bfloat16):
        x, parts = case.arrays(dtype)
        ys, _ = op.forward(x, parts)
        for kind, part, y in zip(case.kinds, parts, ys, strict=True):
            assert (y.dtype, y.shape) == (dtype, (case.n, kind.o))
            exact, magnitude = (_equation(transform, x, part) for transform in (np.array, np.abs))
            roundings = case.i + kind.r + 6 if dtype == "float32" else narrow
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
    for dtype in ("float32", bfloat16):
        x, parts = case.arrays(dtype)
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
    for dtype in ("float32", bfloat16):
        x, parts = case.arrays(dtype)
        saved, dys = op.forward(x, parts)[1], case.cotangents(dtype)
        needed = any(kind.adapted or kind.trained for kind in case.kinds)
        assert (saved.x is not None) == needed
        full, without = op.backward(saved, dys), op.backward(saved, dys, wants_x=False)
        assert without.x is None
        for part, expected in zip(without.parts, full.parts, strict=True):
            for grad, same in zip(part, expected, strict=True):
                np.testing.assert_array_equal(grad, same)


@in_float64
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
    for dtype in ("float32", bfloat16):
        x, parts = case.arrays(dtype)
        dys = case.cotangents(dtype)
        named = _named(x, parts) | {f"dy{p}": dy for p, dy in enumerate(dys)}
        assert_unchanged(named, partial(_run, op, x, parts, dys))


def _run(op: Any, x: Any, parts: tuple[Part, ...], dys: tuple[Any, ...]) -> tuple[Any, Any]:
    ys, saved = op.forward(x, parts)
    return ys, op.backward(saved, dys)


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


def _larger(case: Case, rng: np.random.Generator) -> Case:
    """Return the case with sizes around the kernels' tiles and splits, whole packs of 16 bytes or not."""
    rank = int(rng.choice(_RANKS))
    kinds = tuple(
        kind._replace(o=int(rng.choice(_EDGES)) + kind.o % 4, r=rank - kind.r % 2) for kind in case.kinds
    )
    n, i = (int(size) for size in rng.choice(_EDGES, 2))
    return case._replace(n=n, i=i + case.i % 4, kinds=kinds, texture="normal")


_EDGES = (32, 56, 60, 64, 72, 120, 128, 136, 200, 264)
_RANKS = (2, 8, 16, 16, 18, 50, 100)


def _agreeing(case: Case, dtype: Any, rng: np.random.Generator) -> tuple[np.ndarray, tuple[Part, ...]]:
    """Return x and parts whose products are as large as their corrections; some trained ones stored wider."""
    x, parts = case.arrays(dtype)
    changed = {f"{p}.weight": part.weight * dtype.type(case.i**-0.5) for p, part in enumerate(parts)}
    for p, part in enumerate(parts):
        if part.trained and rng.integers(2):
            changed[f"{p}.weight"] = changed[f"{p}.weight"].astype("float32")
            changed[f"{p}.bias"] = None if part.bias is None else part.bias.astype("float32")
    return x, _parts_with(parts, changed)


def check_agreement(op: Any, case: Case) -> None:
    rng = np.random.default_rng(case.seed + 1)
    case, dtype = _larger(case, rng), rng.choice([bfloat16, bfloat16, np.dtype("float32")])
    x, parts = _agreeing(case, dtype, rng)
    dys = case.cotangents(dtype)
    ys, grads = _run(op, x, parts, dys)
    exact = widened(_named(x, parts) | {f"dy{p}": dy for p, dy in enumerate(dys)})
    exact_dys = tuple(exact[f"dy{p}"] for p in range(len(dys)))
    ys_exact, grads_exact = _run(lowrank_linear, exact["x"], _parts_with(parts, exact), exact_dys)
    assert {y.dtype for y in ys} == {dtype}
    assert_agrees(grads.x, grads_exact.x, "dx")
    for p, (y, y_exact) in enumerate(zip(ys, ys_exact, strict=True)):
        assert_agrees(y, y_exact, f"y of part {p}")
    for p, (found, expected) in enumerate(zip(grads.parts, grads_exact.parts, strict=True)):
        for name, grad, grad_exact in zip(PartGrads._fields, found, expected, strict=True):
            assert (grad is None) == (grad_exact is None), f"d{name} of part {p}"
            if grad is not None:
                assert grad.dtype == "float32"
                assert_agrees(grad, grad_exact, f"d{name} of part {p}", dtype=dtype)


def check_bank_conflicts(op: Any, case: Case) -> None:
    kinds = tuple(kind._replace(adapted=True) for kind in case.kinds)
    case = _larger(case._replace(kinds=kinds), np.random.default_rng(case.seed))
    _run(op, *case.arrays(bfloat16), case.cotangents(bfloat16))
    assert op.emulator.bank_conflicts.reads > 0
    assert op.emulator.bank_conflicts.extra_passes == 0


CHECKS = {
    "LOWRANK-001": check_factor_gradients,
    "LOWRANK-002": check_trained_gradients,
    "LOWRANK-003": check_forward,
    "LOWRANK-004": check_zero_b_is_the_base,
    "LOWRANK-006": check_nothing_unwanted,
    "LOWRANK-007": check_together_equals_alone,
    "LOWRANK-008": check_inputs_unchanged,
    "LOWRANK-009": check_refusals,
    "LOWRANK-010": check_agreement,
}
MEASURED = {"LOWRANK-005": check_frozen_gradient_is_never_formed}  # by what NumPy says that it holds
COUNTED = {"LOWRANK-011": check_bank_conflicts}  # where the memory's passes can be counted: on the emulator


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS) + tried(COUNTED, EMULATED))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


@pytest.mark.parametrize("check", claimed(MEASURED))
@given(case=CASES)
def test_measured_claim(check: Any, case: Case) -> None:
    check(lowrank_linear, case)


def _bug(**changes: Any) -> SimpleNamespace:
    right = {"forward": lowrank_linear.forward, "backward": lowrank_linear.backward}
    return SimpleNamespace(**right | changes)


def _kernel_bug(old: str, new: str, file: str = "lowrank_linear.cu") -> Emulated:
    return Emulated(lora.cuda.lowrank_linear, (file, old, new))


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
    "waits_for_one_copy_less": _kernel_bug(
        "cp_async_wait<0>();\n        __syncthreads();  // x and factor",
        "cp_async_wait<1>();\n        __syncthreads();  // x and factor",
    ),
    "no_barrier_behind_a_copy": _kernel_bug("__syncthreads();  // rows and low", "// rows and low"),
    "overwrites_tiles_in_use": _kernel_bug("__syncthreads();  // until here", "// until here"),
    "swizzles_on_one_side": _kernel_bug(
        "to = place + chunk_offset<WIDTH>(row, chunk);\n        if (in_packs)",
        "to = place + row * 2 * WIDTH + chunk * 16;\n        if (in_packs)",
    ),
    "reads_past_the_rows": _kernel_bug("row < present && at < size);", "at < size);"),
    "stores_past_the_rows": _kernel_bug("if (n < N && o < O)", "if (n <= N && o < O)"),
    "leaves_ranks_out": _kernel_bug("step < min(STEP, R - rank)", "step < min(STEP, R - rank) - 15"),
    "bias_of_the_column_before": _kernel_bug("widened(bias_O[o + 1])", "widened(bias_O[o])"),
    "forgets_the_scale_of_a_sum": _kernel_bug("narrowed<T>(scale * sum)", "narrowed<T>(sum)"),
    "leaves_a_split_out": _kernel_bug("s < S; s++", "s < max(S - 1, 1); s++"),
    "lays_da_out_as_db": _kernel_bug("(c) * by_column", "(c) * R"),
    "no_swizzle": _kernel_bug("((chunk ^ (row & 7)) << 4)", "(chunk << 4)", file="tiles.cuh"),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS | MEASURED | COUNTED, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
