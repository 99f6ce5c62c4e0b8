"""Attempts to falsify contracts/ops/adamw.yaml."""

from __future__ import annotations

import math
from functools import partial
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.cuda.adamw
from lora.contracts import op_contract
from lora.errors import ShapeError
from lora.ops import adamw
from tests.harness.bounds import gamma, relative
from tests.harness.cases import seeds, textured, textures
from tests.harness.claims import assert_killed, planted, schedules
from tests.harness.implementations import Emulated, implementations, in_float64, tried
from tests.ops.observe import assert_refused, peak_bytes

CONTRACT = op_contract("adamw")
IMPLEMENTATIONS = implementations(adamw)
BESIDE = 16  # elements on either side of an array that nobody may touch


class Case(NamedTuple):
    sizes: list[int]
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

    def arrays(self, dtype: str) -> list[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        return [rng.standard_normal(size).astype(dtype) for size in self.sizes]

    def gradients(self, dtype: str) -> list[list[np.ndarray]]:
        """Return the gradients of every array, step by step."""
        rng = np.random.default_rng(self.seed + 1)
        return [
            [np.ascontiguousarray(textured(rng, (size,), self.texture, dtype)) for size in self.sizes]
            for _ in range(self.t)
        ]


CASES = st.builds(
    Case,
    st.lists(
        st.one_of(st.integers(*CONTRACT.domain["P"]), st.sampled_from((4096, 4100, 9000))),
        min_size=CONTRACT.domain["A"][0],
        max_size=CONTRACT.domain["A"][1],
    ),
    st.integers(*CONTRACT.domain["T"]),
    st.sampled_from((1e-1, 2e-4, 0.0)),
    st.sampled_from((0.0, 0.01, 0.5)),
    st.sampled_from((1e-8, 1e-3)),
    textures,
    seeds,
)


class Trained:
    """Parameters with their moments, each somewhere in an array of its own whose other elements stay."""

    def __init__(self, parameters: list[np.ndarray], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._whole: list[np.ndarray] = []
        self.parameters = [self._placed(array, rng) for array in parameters]
        self.moments = [tuple(self._placed(np.zeros_like(a), rng) for _ in "mv") for a in parameters]

    def _placed(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        whole = np.full(array.size + 2 * BESIDE, np.nan, array.dtype)
        start = BESIDE - rng.integers(0, 4)  # some can be read 16 bytes at a time, some cannot
        own = whole[start : start + array.size]
        own[...] = array
        self._whole.append(whole)
        return own

    def step(self, op: Any, gradients: list[np.ndarray], **scalars: Any) -> float:
        return op.step(tuple(self.parameters), tuple(gradients), tuple(self.moments), **scalars)

    def bits(self) -> list[str]:
        # digests: of arrays that differ, pytest would write out every byte
        return [sha256(whole.tobytes()).hexdigest() for whole in self._whole]

    def assert_beside_untouched(self) -> None:
        owns = [*self.parameters, *(moment for both in self.moments for moment in both)]
        for whole, size in zip(self._whole, [own.size for own in owns], strict=True):
            assert np.isnan(whole).sum() == whole.size - size


def _moved(
    op: Any, case: Case, parameters: list[np.ndarray], gradients: list[list[np.ndarray]]
) -> list[np.ndarray]:
    trained = Trained(parameters, case.seed)
    for step, each in enumerate(gradients, 1):
        trained.step(op, each, step=step, **case.scalars)
    return trained.parameters


def _by_hand(
    p: np.ndarray,
    gradients: list[np.ndarray],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> np.ndarray:
    """Return one parameter after its gradients, by the paper's formula in float64."""
    p = p.astype("float64")
    m = v = np.zeros(p.shape)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.astype("float64")
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - math.pow(beta1, t)), v / (1 - math.pow(beta2, t))
        p = p - lr * weight_decay * p - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p


def _assert_formula(op: Any, case: Case, dtype: str, bound: float) -> None:
    gradients = case.gradients(dtype)
    found = _moved(op, case, case.arrays(dtype), gradients)
    for i, (moved, start) in enumerate(zip(found, case.arrays(dtype), strict=True)):
        expected = _by_hand(start, [each[i] for each in gradients], **case.scalars)
        magnitude = np.abs(start).astype("float64") + 4 * case.t * case.lr
        assert (np.abs(moved - expected) <= bound * magnitude).all()


def check_formula(op: Any, case: Case) -> None:
    _assert_formula(op, case, "float32", gamma(16 * case.t, "float32"))


@in_float64
def check_formula_in_float64(op: Any, case: Case) -> None:
    _assert_formula(op, case, "float64", 1e-12)


def check_decay_alone(op: Any, case: Case) -> None:
    zeros = [[np.zeros(size, "float32") for size in case.sizes]] * case.t
    for found, expected in zip(
        _moved(op, case, case.arrays("float32"), zeros), case.arrays("float32"), strict=True
    ):
        for _ in range(case.t):
            expected *= 1 - case.lr * case.weight_decay
        np.testing.assert_array_equal(found, expected)


def check_first_step(op: Any, case: Case) -> None:
    case = case._replace(lr=0.125, weight_decay=0.0, eps=1e-30)
    rng = np.random.default_rng(case.seed)
    gradients = [
        (rng.choice([-1, 1], size) * 10.0 ** rng.uniform(-12, 17, size)).astype("float32")
        for size in case.sizes
    ]
    moved = _moved(op, case, case.arrays("float32"), [gradients])
    for found, start, gradient in zip(moved, case.arrays("float32"), gradients, strict=True):
        move = found.astype("float64") - start
        bound = gamma(12, "float32") * (np.abs(start) + case.lr)
        assert (np.abs(move + case.lr * np.sign(gradient)) <= bound).all()


def check_in_place(op: Any, case: Case) -> None:
    # the last block of the second array is not whole
    case = case._replace(sizes=[*case.sizes[:1], adamw.BLOCK + case.sizes[-1]], texture="normal")
    case = case._replace(lr=0.125, weight_decay=0.0, eps=1e-30)
    gradients = case.gradients("float32")[0]
    before = [gradient.copy() for gradient in gradients]
    trained = Trained(case.arrays("float32"), case.seed)
    trained.step(op, gradients, step=1, **case.scalars)
    trained.assert_beside_untouched()
    for i, start in enumerate(case.arrays("float32")):
        np.testing.assert_array_equal(gradients[i], before[i])
        np.testing.assert_allclose(trained.parameters[i], start - 0.125 * np.sign(before[i]), atol=2e-6)
        np.testing.assert_allclose(trained.moments[i][0], 0.1 * before[i], rtol=1e-6)
        np.testing.assert_allclose(trained.moments[i][1], 0.001 * before[i] * before[i], rtol=1e-6)


def check_refusals(op: Any, case: Case) -> None:
    size = case.sizes[0] + 1
    odd = {
        "not contiguous": np.ones(2 * size, "float32")[::2],
        "float64": np.ones(size),
        f"[{size - 1}]": np.ones(size - 1, "float32"),
    }
    for words, array in odd.items():
        for place in range(4):
            arrays = [np.ones(size, "float32") for _ in range(4)]
            arrays[place] = array
            p, g, m, v = arrays
            assert_refused(ShapeError, words, partial(op.step, (p,), (g,), ((m, v),), step=1, **case.scalars))


def check_memory(op: Any, case: Case) -> None:
    p, g, m, v = np.ones((4, 8 * adamw.BLOCK), "float32")
    used = peak_bytes(lambda: op.step((p,), (g,), ((m, v),), step=1, **case.scalars, clip=0.1))
    assert used < p.nbytes / 3


def check_clipping(op: Any, case: Case) -> None:
    case = case._replace(texture="normal")
    gradients = case.gradients("float32")[0]
    exact = math.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in gradients))

    def stepped(clip: float) -> Trained:
        trained = Trained(case.arrays("float32"), case.seed)
        # with beta1 = 0 the first moment is the gradient as it entered
        norm = trained.step(op, gradients, step=1, **case.scalars | {"beta1": 0.0}, clip=clip)
        assert relative(norm, exact) < 1e-5
        return trained

    assert stepped(2 * exact).bits() == stepped(0.0).bits()
    for (entered, _), gradient in zip(stepped(exact / 3).moments, gradients, strict=True):
        assert relative(entered, gradient.astype("float64") / 3) < 1e-5


def check_not_finite(op: Any, case: Case) -> None:
    gradients = case._replace(texture="normal").gradients("float32")[0]
    broken = gradients[case.seed % len(gradients)]
    broken[case.seed % broken.size] = (np.nan, np.inf, -np.inf)[case.seed % 3]
    trained = Trained(case.arrays("float32"), case.seed)
    before = trained.bits()
    norm = trained.step(op, gradients, step=1, **case.scalars, clip=1.0)
    assert not math.isfinite(norm)
    assert trained.bits() == before


CHECKS = {
    "ADAMW-001": check_formula,
    "ADAMW-002": check_decay_alone,
    "ADAMW-003": check_first_step,
    "ADAMW-004": check_in_place,
    "ADAMW-005": check_refusals,
    "ADAMW-006": check_memory,
    "ADAMW-007": check_formula_in_float64,
    "ADAMW-008": check_clipping,
    "ADAMW-009": check_not_finite,
}


@pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
@given(case=CASES, schedule=schedules)
def test_claim(check: Any, op: Any, case: Case, schedule: int) -> None:
    check(op.on(schedule), case)


def _bug(step: Any) -> SimpleNamespace:
    return SimpleNamespace(step=step)


def _kernel_bug(old: str, new: str, file: str = "adamw.cu") -> Emulated:
    return Emulated(lora.cuda.adamw, (file, old, new))


def _variant(
    *, coupled: bool = False, corrected: bool = True, root: str = "outside", late: bool = False
) -> Any:
    """Return a step in plain NumPy with one thing wrong; with nothing wrong, it is the formula."""

    def step(
        parameters: Any, gradients: Any, moments: Any, *, step: int, clip: float = 0.0, **s: Any
    ) -> None:
        for param, grad, (m, v) in zip(parameters, gradients, moments, strict=True):
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

    return _bug(step)


def _decays_by_lambda(parameters: Any, gradients: Any, moments: Any, **s: Any) -> None:
    for parameter in parameters:
        parameter *= 1 - s["weight_decay"]
    adamw.step(parameters, gradients, moments, **s | {"weight_decay": 0.0})


def _clips_elements(parameters: Any, gradients: Any, moments: Any, **s: Any) -> None:
    clipped = [gradient.clip(-1e-9, 1e-9) for gradient in gradients]
    adamw.step(parameters, clipped, moments, **s | {"eps": 1e-8})


def _moves_a_copy(parameters: Any, gradients: Any, moments: Any, **s: Any) -> None:
    def copied(arrays: Any) -> list[Any]:
        return [np.array(array, "float32", order="C") for array in arrays]

    adamw.step(copied(parameters), copied(gradients), [copied(both) for both in moments], **s)


def _one_block(parameters: Any, gradients: Any, moments: Any, **s: Any) -> None:
    first = slice(adamw.BLOCK)
    adamw.step(
        [p[first] for p in parameters],
        [g[first] for g in gradients],
        [(m[first], v[first]) for m, v in moments],
        **s,
    )


def _consumes(parameters: Any, gradients: Any, moments: Any, **s: Any) -> None:
    adamw.step(parameters, gradients, moments, **s)
    for gradient in gradients:
        gradient[...] = 0


def _each_alone(parameters: Any, gradients: Any, moments: Any, **s: Any) -> float:
    for each in zip(parameters, gradients, moments, strict=True):
        adamw.step(*([one] for one in each), **s)
    return adamw.joint_norm(gradients)


def _scales_up_too(parameters: Any, gradients: Any, moments: Any, *, clip: float, **s: Any) -> float:
    norm = adamw.joint_norm(gradients)
    adamw.step(parameters, [g * ((clip or norm) / norm) for g in gradients], moments, **s)
    return norm


MUTANTS = {
    "couples_the_decay": _variant(coupled=True),
    "forgets_the_bias_correction": _variant(corrected=False),
    "eps_inside_the_root": _variant(root="inside"),
    "eps_uncorrected": _variant(root="uncorrected"),
    "decays_after_the_step": _variant(late=True),
    "decays_by_lambda_alone": _bug(_decays_by_lambda),
    "clips_each_element": _bug(_clips_elements),
    "moves_a_copy": _bug(_moves_a_copy),
    "stops_after_one_block": _bug(_one_block),
    "consumes_the_gradient": _bug(_consumes),
    "temporary_of_full_size": _variant(),
    "takes_each_array_alone": _bug(_each_alone),
    "scales_up_too": _bug(_scales_up_too),
    "kernel_takes_the_row_before": _kernel_bug("FIRST_CHUNK] <= chunk", "FIRST_CHUNK] < chunk"),
    "kernel_swaps_the_moments": _kernel_bug("MEAN = 2, SQUARE = 3", "MEAN = 3, SQUARE = 2"),
    "kernel_forgets_the_factor": _kernel_bug("            g[j] *= factor;\n", ""),
    "kernel_sums_one_chunk_alone": _kernel_bug("c < C; c += THREADS", "c < 1; c += THREADS"),
    "kernel_has_no_barrier_in_the_sum": _kernel_bug(
        "    __syncthreads();\n    float sum", "    float sum", "reduce.cuh"
    ),
    "kernel_moves_what_is_not_finite": _kernel_bug("if (!(norm < INFINITY)) return;", ""),
    "kernel_stores_past_the_array": _kernel_bug("if (column + i < width) row", "row", "pack.cuh"),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
