"""Products with a stored weight, shared out over threads and widened block by block, or as BLAS does them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16, gemm, linear, linear_transpose, threads

sizes = st.integers(1, 40)


@pytest.fixture(params=[1, 2, 3], autouse=True)
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(threads, "thread_count", lambda: request.param)
    monkeypatch.setattr(gemm, "thread_count", lambda: request.param)
    monkeypatch.setattr(gemm, "_SHARED_ROWS", 4)
    threads._pool.cache_clear()
    yield request.param
    threads._pool.cache_clear()


@given(n=sizes, i=sizes, o=sizes, block=st.integers(1, 600), seed=st.integers(0, 99), adds=st.booleans())
def test_both_products_are_those_of_the_widened_weight(
    n: int, i: int, o: int, block: int, seed: int, adds: bool
) -> None:
    rng = np.random.default_rng(seed)
    x, dy, onto = (rng.standard_normal(shape) for shape in ((n, i), (n, o), (n, i)))
    weight = rng.standard_normal((o, i)).astype(bfloat16)
    exact = weight.astype(np.float64)
    start = onto.copy() if adds else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "WIDENED_BYTES", 8 * block)
        np.testing.assert_allclose(linear(x, weight), x @ exact.T, rtol=1e-12, atol=1e-12)
        found = linear_transpose(dy, weight, onto=start)
    np.testing.assert_allclose(found, dy @ exact + onto * adds, rtol=1e-12, atol=1e-12)
    assert not adds or found is start


def test_a_long_axis_is_cut_into_a_share_a_thread(count: int) -> None:
    weight = np.empty((4 * count + 1, 4 * count - 1), bfloat16)
    shares = gemm._shares(weight, axis=0)
    assert len(shares) == count
    assert [index for share in shares for index in range(len(weight))[share]] == list(range(len(weight)))
    assert gemm._shares(weight, axis=1) == [slice(0, weight.shape[1])]
