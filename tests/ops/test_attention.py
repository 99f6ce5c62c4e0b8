"""Attempts to falsify contracts/ops/attention.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.host.attention
from lora.backend import bfloat16
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import attention
from tests.harness.bounds import assert_within
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, claimed, planted, schedules
from tests.harness.gradcheck import assert_gradients
from tests.harness.implementations import Emulated, implementations, tried
from tests.ops import attention_kernels as kernels
from tests.ops.observe import assert_refused, assert_unchanged, peak_bytes, random_boundaries

CONTRACT = op_contract("attention")


def _in_small_tiles(op: Any) -> SimpleNamespace:
    """Return `op` cutting tiles of about five rows: short sequences then meet every cut and every joint."""

    def cut(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **scalars: Any) -> Any:
            of_host = {"ROWS": 5, "MOST_ROWS": 8, "LEAST_ROWS": 2, "TILE_SCORES": 200}
            with (
                patch.multiple(attention, TILE_SCORES=1, JOINED_TOKENS=5),
                patch.multiple(lora.host.attention, **of_host),
            ):
                return function(*args, **scalars)

        return run

    name = f"{op.__name__} in small tiles"
    return SimpleNamespace(__name__=name, forward=cut(op.forward), backward=cut(op.backward))


WHOLE = [attention, lora.host.attention]
IMPLEMENTATIONS = [*WHOLE, *map(_in_small_tiles, WHOLE)]
_, _, *KERNELS = implementations(attention)
EMULATED = [op for op in KERNELS if isinstance(op, Emulated)]


class Case(NamedTuple):
    s: int
    t: int
    g: int
    m: int
    e: int
    scale: float
    texture: str
    seed: int

    def arrays(self, dtype: Any) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        cu_seqlens = random_boundaries(rng, self.s, self.t)
        n, heads = int(cu_seqlens[-1]), {"q": self.g * self.m, "k": self.g, "v": self.g}
        qkv = {name: textured(rng, (n, h, self.e), self.texture, dtype) for name, h in heads.items()}
        return {**qkv, "cu_seqlens": cu_seqlens}

    def cotangent(self, arrays: dict[str, Any]) -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal(arrays["q"].shape).astype(arrays["q"].dtype)


CASES = st.builds(
    Case,
    *(st.integers(*CONTRACT.domain[axis]) for axis in "STGME"),
    st.sampled_from((1.0, 0.3, 0.125)),
    textures,
    seeds,
)


class Exact(NamedTuple):
    """One head of one sequence, by the definition."""

    index: tuple[slice, int]  # its place in o
    o: np.ndarray  # [T, E]
    lse: np.ndarray  # [T]
    size: np.ndarray  # [T, E] Σ p |v|
    slope: np.ndarray  # [T, 1] the largest scale · |q|·|k|: how far an error of the scores moves the weights


def _heads(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    *,
    scale: float,
    head: Callable[[int, int, int], int] = lambda h, m, g: h // m,
    visible: Callable[[int], Any] = lambda t: np.tri(t, dtype=bool),
    shifted: bool = True,
) -> Iterator[Exact]:
    """Yield the equation for every sequence and head in float64; the arguments after scale plant bugs."""
    q, k, v = (array.astype("float64") for array in (q, k, v))
    groups = k.shape[1]
    for a, b in pairwise(cu_seqlens):
        for h in range(q.shape[1]):
            g = head(h, q.shape[1] // groups, groups)
            q_h, k_h, v_h = q[a:b, h], k[a:b, g], v[a:b, g]
            scores = np.where(visible(b - a), scale * q_h @ k_h.T, -np.inf)
            top = scores.max(-1, keepdims=True) if shifted else 0 * scores[:, :1]
            p, magnitude = np.exp(scores - top), scale * np.abs(q_h) @ np.abs(k_h).T
            total = p.sum(-1, keepdims=True)
            lse = (top + np.log(total))[:, 0]
            slope = np.where(visible(b - a), magnitude, 0).max(-1, keepdims=True)
            yield Exact((slice(a, b), h), p @ v_h / total, lse, p @ np.abs(v_h) / total, slope)


def check_gradients(op: Any, case: Case) -> None:
    # at scores of a million a softmax is a step, which no difference can follow
    case = case._replace(texture="normal") if case.texture == "large" else case
    arrays = case.arrays("float64")
    constants = {"cu_seqlens": arrays.pop("cu_seqlens"), "scale": case.scale}
    do = case.cotangent(arrays)
    grads = op.backward(op.forward(**arrays, **constants)[1], do)

    def forward(**inputs: Any) -> Any:
        return op.forward(**inputs, **constants)[0]

    assert_gradients(forward, arrays, (do,), grads._asdict(), np.random.default_rng(case.seed + 2))


def check_forward(op: Any, case: Case) -> None:
    for dtype in ("float32", bfloat16):
        arrays = case.arrays(dtype)
        o, _ = op.forward(**arrays, scale=case.scale)
        assert o.dtype == dtype
        roundings = case.t + case.e + 10
        for exact in _heads(**arrays, scale=case.scale):
            found = o[exact.index].astype("float64")
            # of a bfloat16 output, one rounding more; what came before it was float32
            rounding = np.abs(exact.o) * (2**-8 if dtype == bfloat16 else 0)
            excess = np.sign(found - exact.o) * np.maximum(np.abs(found - exact.o) - rounding, 0)
            assert_within(exact.o + excess, exact.o, exact.size * (1 + 4 * exact.slope), roundings, "float32")


def check_packed_equals_alone(op: Any, case: Case) -> None:
    case = case._replace(texture="normal")
    arrays = case.arrays("float64")
    o, saved = op.forward(**arrays, scale=case.scale)
    do = case.cotangent(arrays)
    grads = op.backward(saved, do)
    for a, b in pairwise(arrays["cu_seqlens"]):
        own = {name: arrays[name][a:b] for name in "qkv"}
        alone, saved_alone = op.forward(**own, cu_seqlens=np.array([0, b - a]), scale=case.scale)
        np.testing.assert_allclose(o[a:b], alone, rtol=1e-12, atol=1e-12)
        for found, expected in zip(grads, op.backward(saved_alone, do[a:b]), strict=True):
            np.testing.assert_allclose(found[a:b], expected, rtol=1e-12, atol=1e-11)


def check_causality(op: Any, case: Case) -> None:
    # with small scores no visible token's weight is lost in rounding
    case = case._replace(texture="normal", scale=0.1 / case.e)
    arrays = case.arrays("float32")
    last = int(arrays["cu_seqlens"][-1])
    changed_at = last - 1 - case.seed % case.t
    before, _ = op.forward(**arrays, scale=case.scale)
    for name in "qkv":
        moved = arrays[name].copy()
        moved[changed_at] += 3
        after, _ = op.forward(**{**arrays, name: moved}, scale=case.scale)
        np.testing.assert_array_equal(after[:changed_at], before[:changed_at])
    assert (after[changed_at] != before[changed_at]).all(), "a token does not see its own value"


def check_large_scores(op: Any, case: Case) -> None:
    case = case._replace(texture="normal")
    arrays = case.arrays("float32")
    arrays["q"] *= 1000
    arrays["k"] *= 1000
    o, saved = op.forward(**arrays, scale=1.0)
    grads = op.backward(saved, case.cotangent(arrays))
    assert all(np.isfinite(array).all() for array in (o, *grads))
    for a, b in pairwise(arrays["cu_seqlens"]):
        values = np.repeat(arrays["v"][a:b], case.m, axis=1)
        slack = 1e-5 * np.abs(values).max()
        assert (o[a:b] >= np.minimum.accumulate(values) - slack).all()
        assert (o[a:b] <= np.maximum.accumulate(values) + slack).all()


def check_lse(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    _, saved = op.forward(**arrays, scale=case.scale)
    for exact in _heads(**arrays, scale=case.scale):
        magnitude = 1 + 2 * exact.slope[:, 0] + np.abs(exact.lse)
        assert_within(saved.lse[exact.index], exact.lse, magnitude, case.t + case.e + 10, "float32")


def check_common_part(op: Any, case: Case) -> None:
    rng, tokens, width = np.random.default_rng(case.seed), 60, 64
    common = np.where(np.arange(width) < 8, 1e4, 0)
    noise = [rng.standard_normal((tokens, heads, width)) for heads in (4, 2, 2, 4)]
    q, k = noise[0] + common / 100, noise[1] * np.where(common, 1e-3, 1) + common
    arrays, errors = [array.astype("float32") for array in (q, k, *noise[2:])], []
    for dtype in ("float64", "float32"):
        q, k, v, do = (array.astype(dtype) for array in arrays)
        o, saved = op.forward(q, k, v, np.array([0, 21, tokens]), scale=0.1)
        errors.append((o, *op.backward(saved, do)))
    of_o, *of_gradients = (
        np.linalg.norm(found - exact) / np.linalg.norm(exact) for exact, found in zip(*errors, strict=True)
    )
    assert max(of_gradients) < 4 * of_o


def check_memory(op: Any, case: Case) -> None:
    arrays = case._replace(s=1, t=2000, g=1, m=4, e=8).arrays("float32")
    o, saved = op.forward(**arrays, scale=case.scale)
    scores = 4 * o.shape[0] ** 2 * o.shape[1]
    assert peak_bytes(lambda: op.forward(**arrays, scale=case.scale)) < scores / 4
    assert peak_bytes(lambda: op.backward(saved, np.ones_like(o))) < scores / 4


def check_inputs_unchanged(op: Any, case: Case) -> None:
    arrays = case.arrays("float32")
    do = case.cotangent(arrays)

    def run() -> None:
        _, saved = op.forward(**arrays, scale=case.scale)
        op.backward(saved, do)

    assert_unchanged({**arrays, "do": do}, run)


def check_refusals(op: Any, case: Case) -> None:
    arrays = case._replace(m=2 * case.m, e=case.e + 1).arrays("float32")
    q, k, v, cu_seqlens = arrays.values()
    wrong = [
        {"q": q[:, : case.g + case.g * (2 * case.m - 1) // (2 * case.m), :-1]},
        {"k": k[:-1]},
        {"v": v[..., :-1]},
        {"k": np.repeat(k, 4 * case.m, axis=1), "v": np.repeat(v, 4 * case.m, axis=1)},
        {"cu_seqlens": np.append(cu_seqlens[:-1], cu_seqlens[-1] - 1)},
        {"cu_seqlens": np.append(1, cu_seqlens[1:])},
    ]
    for arguments in wrong:
        assert_refused(ShapeError, "boundaries", partial(op.forward, **{**arrays, **arguments}, scale=1.0))


CHECKS = {
    "ATTENTION-001": check_gradients,
    "ATTENTION-002": check_forward,
    "ATTENTION-003": check_packed_equals_alone,
    "ATTENTION-004": check_causality,
    "ATTENTION-005": check_large_scores,
    "ATTENTION-006": check_lse,
    "ATTENTION-008": check_inputs_unchanged,
    "ATTENTION-009": check_refusals,
    "ATTENTION-016": check_common_part,
}
MEASURED = {"ATTENTION-007": check_memory}  # on one case: what it allocates depends on sizes alone


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, op: Any, case: Case) -> None:
    check(op, case)


@pytest.mark.parametrize("op", IMPLEMENTATIONS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("check", claimed(MEASURED))
def test_measured_claim(check: Any, op: Any) -> None:
    check(op, Case(s=1, t=1, g=1, m=1, e=1, scale=0.3, texture="normal", seed=0))


@pytest.mark.parametrize(("check", "op"), tried(kernels.CHECKS, KERNELS) + tried(kernels.COUNTED, EMULATED))
@given(case=kernels.CASES, schedule=schedules)
def test_kernel_claim(check: Any, op: Any, case: kernels.Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"forward": attention.forward, "backward": attention.backward} | changes)


def _defined(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float, **bug: Any) -> Any:
    """Run the equation with the `bug` that `_heads` plants; what is saved is right."""
    o = np.empty(q.shape)
    for head in _heads(q, k, v, cu_seqlens, scale=scale, **bug):
        o[head.index] = head.o
    return o.astype(q.dtype), attention.forward(q, k, v, cu_seqlens, scale=scale)[1]


def _with_lse(change: Callable[[Any, Any], Any]) -> SimpleNamespace:
    def forward(*args: Any, **named: Any) -> Any:
        o, saved = attention.forward(*args, **named)
        return o, saved._replace(lse=change(saved.lse, saved))

    return _bug(forward=forward)


def _largest_scores(saved: Any) -> Any:
    tops = np.empty(saved.lse.shape)
    ones = np.ones_like(saved.v)
    for head in _heads(saved.q, saved.k, ones, saved.cu_seqlens, scale=saved.scale):
        rows, h = head.index
        g = h // (saved.q.shape[1] // saved.k.shape[1])
        scores = saved.scale * saved.q[rows, h].astype("float64") @ saved.k[rows, g].T.astype("float64")
        tops[head.index] = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf).max(-1)
    return tops


def _one_shared_head(saved: Any, do: Any) -> Any:
    first = do.copy()
    first.reshape(len(do), saved.k.shape[1], -1, do.shape[-1])[:, :, 1:] = 0
    return attention.backward(saved, do)._replace(v=attention.backward(saved, first).v)


def _sees_others(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float) -> Any:
    o, _ = attention.forward(q, k, v, cu_seqlens[[0, -1]], scale=scale)
    return o, attention.forward(q, k, v, cu_seqlens, scale=scale)[1]


def _leaks_backward(saved: Any, do: Any) -> Any:
    joined = attention.forward(*saved[:3], saved.cu_seqlens[[0, -1]], scale=saved.scale)[1]
    return attention.backward(joined, do)


def _unsummed(saved: Any, do: Any) -> Any:
    return attention.backward(saved._replace(o=np.zeros_like(saved.o)), do)


def _scales_later(saved: Any, do: Any) -> Any:
    plain = attention._scores

    def scores(queries: Any, keys: Any, tile: Any, scale: float) -> Any:
        return plain(queries, keys * np.float32(scale), tile, 1.0)

    with patch.object(attention, "_scores", scores):
        return attention.backward(saved, do)


def _one_tile(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **scalars: Any) -> Any:
        with patch.multiple(attention, TILE_SCORES=2**40):
            return function(*args, **scalars)

    return run


def _scaling_q(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float) -> Any:
    q *= np.float32(scale)
    q += 1
    return attention.forward(q, k, v, cu_seqlens, scale=1.0)


def _ignoring_the_rest(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float) -> Any:
    return attention.forward(q, k, v, np.append(cu_seqlens[:-1], len(q)), scale=scale)


MUTANTS = {
    "makes_other_scores_in_backward": _bug(backward=_scales_later),
    "misses_the_row_sum": _bug(backward=_unsummed),
    "forgets_the_scale_in_dq": _bug(
        backward=lambda s, do: attention.backward(s, do)._replace(q=attention.backward(s, do).q / s.scale)
    ),
    "gradient_of_one_shared_head": _bug(backward=_one_shared_head),
    "swaps_dk_and_dv": _bug(
        backward=lambda s, do: attention.Grads(*(attention.backward(s, do)[i] for i in (0, 2, 1)))
    ),
    "interleaves_the_groups": _bug(forward=partial(_defined, head=lambda h, m, g: h % g)),
    "forgets_the_scale": _bug(forward=lambda *a, scale, **k: attention.forward(*a, **k, scale=1.0)),
    "squares_the_scale": _bug(forward=lambda *a, scale, **k: attention.forward(*a, **k, scale=scale**2)),
    "sees_the_future": _bug(forward=partial(_defined, visible=lambda t: np.ones((t, t), bool))),
    "misses_itself": _bug(
        forward=partial(_defined, visible=lambda t: np.tri(t, k=-1, dtype=bool) | (np.arange(t) == 0))
    ),
    "sees_other_sequences": _bug(forward=_sees_others),
    "leaks_backward_over_a_boundary": _bug(backward=_leaks_backward),
    "exponentiates_unshifted": _bug(forward=partial(_defined, shifted=False)),
    "lse_of_the_shifted": _with_lse(lambda lse, saved: lse - _largest_scores(saved)),
    "lse_in_base_2": _with_lse(lambda lse, saved: lse / np.log(2)),
    "one_tile": _bug(forward=_one_tile(attention.forward), backward=_one_tile(attention.backward)),
    "scales_q_in_place": _bug(forward=_scaling_q),
    "ignores_the_rest": _bug(forward=_ignoring_the_rest),
}


ALL_CHECKS = CHECKS | MEASURED | kernels.CHECKS | kernels.COUNTED


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, ALL_CHECKS, MUTANTS | kernels.MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    in_kernel = mutant in kernels.MUTANTS.values()
    assert_killed(check, mutant, kernels.CASES if in_kernel else CASES)
