"""The products that NumPy has no call for, on arrays as they lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import matmul_into
from lora.backend.blas import gemm

LAYOUTS = {
    "plain": lambda x: x.copy(),
    "cut": lambda x: np.pad(x, ((1, 2), (3, 1)))[1:-2, 3:-1],
    "transposed": lambda x: x.T.copy().T,
    "transposed cut": lambda x: np.pad(x.T, ((1, 2), (3, 1)))[1:-2, 3:-1].T,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}
sizes = st.integers(1, 9)
layouts = st.sampled_from(sorted(LAYOUTS))


@given(sizes, sizes, sizes, layouts, layouts, st.booleans(), st.sampled_from([1.0, -2.5]), st.integers(0, 99))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_is_scaled_and_added_whatever_the_layout(
    dtype: str, m: int, n: int, k: int, of_a: str, of_b: str, accumulate: bool, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n)))
    around = rng.standard_normal((m, n + 2)).astype(dtype)
    before, out = around.copy(), around[:, 1:-1]
    a, b = LAYOUTS[of_a](a), LAYOUTS[of_b](b)
    matmul_into(out, a, b, scale=scale, accumulate=accumulate)
    exact = scale * (a.astype("float64") @ b.astype("float64")) + accumulate * before[:, 1:-1]
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-4 if dtype == "float32" else 1e-12)
    np.testing.assert_array_equal(around[:, [0, -1]], before[:, [0, -1]])


def test_what_blas_cannot_read_is_refused_and_left_alone() -> None:
    out, a = np.ones((4, 4), np.float32), np.ones((4, 8), np.float32)
    assert not gemm(out, a[:, ::2], a[:, :4], scale=1.0, accumulate=True)
    assert not gemm(out, a[:, :4].astype("float64"), a[:, :4], scale=1.0, accumulate=True)
    assert not gemm(out[:, ::-1], a[:, :4], a[:, :4], scale=1.0, accumulate=True)
    assert (out == 1).all()
