"""What attention's kernels promise beside the reference, ATTENTION-010 to -015, and bugs planted in them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st

import lora.cuda.attention
from lora.backend import bfloat16
from lora.errors import ShapeError, UnsupportedError
from lora.ops import attention
from tests.harness.agreement import assert_agrees, widened
from tests.harness.cases import seeds, textured
from tests.harness.implementations import Emulated
from tests.ops.observe import assert_refused, random_boundaries

# around the ends of tiles of 32, 48, 64 and 128 tokens
EDGES = (1, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 144, 192)


class Case(NamedTuple):
    s: int
    t: int
    g: int
    m: int
    e: int
    scale: float
    texture: str
    blocks: (
        int  # that the keys' pass has enough of: with few of them, a block goes through all heads of a group
    )
    seed: int

    def arrays(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.seed)
        cu_seqlens = random_boundaries(rng, self.s, self.t)
        n, heads = int(cu_seqlens[-1]), {"q": self.g * self.m, "k": self.g, "v": self.g}
        qkv = {name: textured(rng, (n, h, self.e), self.texture, bfloat16) for name, h in heads.items()}
        return {**qkv, "cu_seqlens": cu_seqlens}

    def cotangent(self, arrays: dict[str, Any]) -> np.ndarray:
        return np.random.default_rng(self.seed + 1).standard_normal(arrays["q"].shape).astype(bfloat16)


CASES = st.builds(
    Case,
    st.integers(1, 4),
    st.one_of(st.integers(1, 48), st.sampled_from(EDGES), st.integers(1, 200)),
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from((64, 64, 128, 256)),
    st.sampled_from((0.3, 0.125, 0.0625)),
    st.sampled_from(("normal", "normal", "zeros", "equal_rows", "strided")),
    st.sampled_from((1, lora.cuda.attention.ENOUGH_BLOCKS)),
    seeds,
)


def check_agreement(op: Any, case: Case) -> None:
    arrays = case.arrays()
    do = case.cotangent(arrays)
    o, saved = op.forward(**arrays, scale=case.scale)
    grads = _backward(op, case, saved, do)
    o_exact, saved_exact = attention.forward(**widened(arrays), scale=case.scale)
    exact = attention.backward(saved_exact, do.astype("float64"))
    assert_agrees(o, o_exact, "o")
    np.testing.assert_allclose(_on_host(saved.lse), saved_exact.lse, rtol=1e-5, atol=1e-5)
    assert_agrees(grads.v, exact.v, "dv")
    # where weights are nearly 0 or 1 the terms of dq and dk cancel, and what remains is o's own rounding
    terms = _cancelling_terms(saved_exact, do.astype("float64"))
    for name, parts in terms.items():
        expected = getattr(exact, name)
        assert_agrees(getattr(grads, name), expected, f"d{name}", terms=np.abs(expected) + parts / 8)


def _backward(op: Any, case: Case, saved: Any, do: np.ndarray) -> Any:
    with patch.object(lora.cuda.attention, "ENOUGH_BLOCKS", case.blocks):
        return op.backward(saved, do)


def _cancelling_terms(saved: attention.Saved, do: np.ndarray) -> dict[str, np.ndarray]:
    """Return for dq and dk the sums of their terms' absolute values, in float64."""
    q, k, v, o, lse, cu_seqlens, scale = saved
    share = q.shape[1] // k.shape[1]
    terms = {"q": np.zeros(q.shape), "k": np.zeros(k.shape)}
    for a, b in pairwise(cu_seqlens):
        for h in range(q.shape[1]):
            q_h, k_h, v_h, do_h = q[a:b, h], k[a:b, h // share], v[a:b, h // share], do[a:b, h]
            p = np.tril(np.exp(np.minimum(scale * q_h @ k_h.T - lse[a:b, h, None], 0)))
            delta = np.abs(do_h * o[a:b, h]).sum(axis=-1, keepdims=True)
            sizes = scale * p * (np.abs(do_h @ v_h.T) + delta)
            terms["q"][a:b, h] = sizes @ np.abs(k_h)
            terms["k"][a:b, h // share] += sizes.T @ np.abs(q_h)
    return terms


def check_packed_equals_alone(op: Any, case: Case) -> None:
    arrays = case.arrays()
    do = case.cotangent(arrays)
    o, saved = op.forward(**arrays, scale=case.scale)
    packed = (o, _on_host(saved.lse), *_backward(op, case, saved, do))
    for a, b in pairwise(arrays["cu_seqlens"]):
        own = {name: arrays[name][a:b] for name in "qkv"}
        o, saved = op.forward(**own, cu_seqlens=np.array([0, b - a]), scale=case.scale)
        for found, alone in zip(
            packed, (o, _on_host(saved.lse), *_backward(op, case, saved, do[a:b])), strict=True
        ):
            np.testing.assert_array_equal(_bits(found[a:b]), _bits(alone))


def check_causality(op: Any, case: Case) -> None:
    # with small scores no visible token's weight is lost in rounding
    case = case._replace(texture="normal", scale=0.1 / case.e)
    arrays = case.arrays()
    last = int(arrays["cu_seqlens"][-1])
    changed_at = last - 1 - case.seed % case.t
    before, _ = op.forward(**arrays, scale=case.scale)
    for name in "qkv":
        moved = arrays[name].copy()
        moved[changed_at] += 64
        after, _ = op.forward(**{**arrays, name: moved}, scale=case.scale)
        np.testing.assert_array_equal(_bits(after[:changed_at]), _bits(before[:changed_at]))
    assert (after[changed_at] != before[changed_at]).all(), "a token does not see its own value"


def check_large_scores(op: Any, case: Case) -> None:
    arrays = case._replace(texture="normal").arrays()
    for name in "qk":
        arrays[name] = (arrays[name].astype("float32") * 1000).astype(bfloat16)
    o, saved = op.forward(**arrays, scale=1.0)
    grads = _backward(op, case, saved, case.cotangent(arrays))
    o, *grads = (np.asarray(array, "float32") for array in (o, *grads))
    assert all(np.isfinite(array).all() for array in (o, *grads))
    for a, b in pairwise(arrays["cu_seqlens"]):
        values = np.repeat(arrays["v"][a:b], case.m, axis=1).astype("float32")
        slack = 2**-8 * np.abs(values).max()
        assert (o[a:b] >= np.minimum.accumulate(values) - slack).all()
        assert (o[a:b] <= np.maximum.accumulate(values) + slack).all()


def check_refusals(op: Any, case: Case) -> None:
    arrays = case._replace(m=2 * case.m, t=min(case.t, 40)).arrays()
    q, k, v, _ = arrays.values()
    unsupported = [{name: arrays[name].astype("float32")} for name in "qkv"]
    unsupported.append({name: arrays[name][..., :48] for name in "qkv"})
    for arguments in unsupported:
        call = partial(op.forward, **{**arrays, **arguments}, scale=case.scale)
        assert_refused(UnsupportedError, "attention on a GPU", call)
    misfits = [
        {"q": q[:-1]},
        {"k": k[:-1]},
        {"v": v[..., :-1]},
        {"k": np.repeat(k, 4 * case.m, axis=1), "v": np.repeat(v, 4 * case.m, axis=1)},
        {"scale": 0.0},
    ]
    for arguments in misfits:
        call = partial(op.forward, **{**arrays, "scale": case.scale, **arguments})
        assert_refused(ShapeError, "expected q [N, H, E]", call)


def check_bank_conflicts(op: Any, case: Case) -> None:
    arrays = case.arrays()
    _, saved = op.forward(**arrays, scale=case.scale)
    _backward(op, case, saved, case.cotangent(arrays))
    assert op.emulator.bank_conflicts.reads > 0
    assert op.emulator.bank_conflicts.extra_passes == 0


def _on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


CHECKS = {
    "ATTENTION-010": check_agreement,
    "ATTENTION-011": check_packed_equals_alone,
    "ATTENTION-012": check_causality,
    "ATTENTION-013": check_large_scores,
    "ATTENTION-014": check_refusals,
}
COUNTED = {"ATTENTION-015": check_bank_conflicts}  # where the memory's passes can be counted: on the emulator

TILES, SHARED, FORWARD, BACKWARD = "tiles.cuh", "attention.cuh", "attention.cu", "attention_backward.cu"


def _bug(file: str, old: str, new: str) -> Emulated:
    return Emulated(lora.cuda.attention, (file, old, new))


def _rounding(q: Any, k: Any, v: Any, cu_seqlens: Any, *, scale: float) -> Any:
    return lora.cuda.attention.forward(*(x.astype(bfloat16) for x in (q, k, v)), cu_seqlens, scale=scale)


MUTANTS: dict[str, Any] = {
    "no_barrier_behind_a_copy": _bug(
        FORWARD, "__syncthreads();  // tile n has landed", "// tile n has landed"
    ),
    "waits_for_one_copy_less": _bug(
        BACKWARD,
        "cp_async_wait<0>();\n        __syncthreads();  // tile n",
        "cp_async_wait<1>();\n        __syncthreads();  // tile n",
    ),
    "keys_overwritten_too_early": _bug(BACKWARD, "if constexpr (KEEP_K) __syncthreads();", ""),
    "swizzles_on_one_side": _bug(
        SHARED,
        "cp_async_16(tile + chunk_offset<E>(own + row, chunk + piece)",
        "cp_async_16(tile + (own + row) * 2 * E + (chunk + piece) * 16",
    ),
    "dynamic_memory_unaligned": _bug(TILES, "__align__(128) ", "__align__(16) "),
    "sees_one_key_ahead": _bug(SHARED, "place > diagonal :", "place > diagonal + 1 :"),
    "gradient_sees_one_query_back": _bug(SHARED, ": place < diagonal", ": place < diagonal - 1"),
    "group_of_another_head": _bug(SHARED, "found.head / (H / G)", "found.head % G"),
    "reads_past_the_sequence": _bug(SHARED, "own + row < present);", "true);"),
    "stores_past_the_sequence": _bug(SHARED, "if (row < present)", "if (row <= present)"),
    "leaves_a_tile_out": _bug(SHARED, "lane_index()) - 1)) == before", "lane_index()) - 1)) == 0"),
    "keeps_the_old_scale": _bug(FORWARD, "total[strip][half] *= shrink;", ""),
    "half_of_delta": _bug(BACKWARD, "for (int i = 0; i < 8; i++) along", "for (int i = 0; i < 4; i++) along"),
    "lse_of_another_head": _bug(BACKWARD, "lse_NH[row] * LOG2_E", "lse_NH[row / H * H] * LOG2_E"),
    "dk_without_scale": _bug(
        BACKWARD, "store_rows<E>(dk, Scales<STRIPS>(scale)", "store_rows<E>(dk, Scales<STRIPS>(1.0f)"
    ),
    "dk_of_one_head": _bug(BACKWARD, "head < tile.head + tile.heads", "head < tile.head + 1"),
    "leaves_a_part_out": _bug(BACKWARD, "part < P; part++", "part < P - 1; part++"),
    "shifts_by_nothing": _bug(
        FORWARD, "p[strip][j][i] * scale2 - shift[strip][i / 2]", "p[strip][j][i] * scale2"
    ),
    "rounds_in_silence": SimpleNamespace(forward=_rounding, backward=lora.cuda.attention.backward),
    "no_swizzle": _bug(TILES, "((chunk ^ (row & 7)) << 4)", "(chunk << 4)"),
}
