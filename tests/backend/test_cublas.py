"""What cuBLAS is asked for, run by its documentation, is the product that was wanted, for every layout."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.backend.cublas as binding
from lora.backend import bfloat16, linear, linear_transpose, matmul, matmul_into
from lora.backend.cublas import WORKSPACE_BYTES, Cublas
from lora.errors import DeviceError, ShapeError
from tests.backend.fake_cublas import FakeCublas
from tests.backend.fake_cupy import DeviceArray, FakeCupy


@pytest.fixture(autouse=True)
def cublas(monkeypatch: pytest.MonkeyPatch) -> FakeCublas:
    library = FakeCublas()
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    monkeypatch.setattr(binding, "_library", lambda: library)
    binding._cublas.cache_clear()
    return library


class Case(NamedTuple):
    """A product of stacks of `batch` matrices (None for single ones), and how each array lies in memory."""

    batch: int | None
    m: int
    n: int
    k: int
    dtypes: tuple[str, str]  # of the operands and of the result
    layouts: tuple[str, str]
    shared: bool  # the stack meets one matrix b
    cut: int  # columns beside the result that nobody may touch
    scale: float
    accumulate: bool
    seed: int


SIZES = st.integers(1, 9)
CASES = st.builds(
    Case,
    batch=st.none() | st.integers(1, 3),
    m=SIZES,
    n=SIZES,
    k=SIZES,
    dtypes=st.sampled_from([("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "cut", "transposed cut"])] * 2),
    shared=st.booleans(),
    cut=st.integers(0, 3),
    scale=st.sampled_from([1.0, 2.0, -0.5]),
    accumulate=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def laid_out(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, layout: str) -> np.ndarray:
    """Return random whole numbers of `shape`, of which sums are exact, in memory that `layout` describes."""
    *stack, rows, columns = shape
    stored = (columns, rows) if "transposed" in layout else (rows, columns)
    wider = (*stack, stored[0], stored[1] + (3 if "cut" in layout else 0))
    whole = rng.integers(-8, 9, wider).astype(bfloat16 if dtype == "bfloat16" else dtype)
    kept = whole[..., : stored[1]]
    return kept.swapaxes(-1, -2) if "transposed" in layout else kept


@given(case=CASES)
def test_every_layout_gives_the_product_and_touches_nothing_else(case: Case) -> None:
    rng, stack = np.random.default_rng(case.seed), (() if case.batch is None else (case.batch,))
    a = laid_out(rng, (*stack, case.m, case.k), case.dtypes[0], case.layouts[0])
    b = laid_out(rng, (*(() if case.shared else stack), case.k, case.n), case.dtypes[0], case.layouts[1])
    whole = laid_out(rng, (*stack, case.m, case.n + case.cut), case.dtypes[1], "plain")
    if not case.accumulate:
        whole[..., : case.n] = np.nan
    before = whole.astype("float64")
    expected = case.scale * (a.astype("float64") @ b.astype("float64"))
    if case.accumulate:
        expected += before[..., : case.n]

    out = DeviceArray(whole[..., : case.n])
    given_back = matmul_into(
        out, DeviceArray(a), DeviceArray(b), scale=case.scale, accumulate=case.accumulate
    )

    assert given_back is out
    np.testing.assert_array_equal(whole[..., : case.n], expected.astype(whole.dtype))
    np.testing.assert_array_equal(whole[..., case.n :].astype("float64"), before[..., case.n :])


@given(n=SIZES, i=SIZES, o=SIZES, dtypes=st.sampled_from(["ff", "bb", "fb"]), block=st.integers(1, 60))
def test_linear_layers_give_what_numpy_gives(n: int, i: int, o: int, dtypes: str, block: int) -> None:
    rng, names = np.random.default_rng(0), {"f": "float32", "b": "bfloat16"}
    x, weight = (
        laid_out(rng, (n, i), names[dtypes[0]], "plain"),
        laid_out(rng, (o, i), names[dtypes[1]], "plain"),
    )
    dy = laid_out(rng, (n, o), names[dtypes[0]], "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.backend.gemm.WIDENED_BYTES", 4 * block)
        for function, rows in ((linear, x), (linear_transpose, dy)):
            device = function(DeviceArray(rows), DeviceArray(weight)).host
            host = function(rows, weight)
            assert device.dtype == host.dtype == np.float32
            np.testing.assert_array_equal(device, host)


def test_a_stack_of_bfloat16_is_one_call(cublas: FakeCublas) -> None:
    a, b = (DeviceArray(np.ones((5, 4, 4), bfloat16)) for _ in range(2))
    product = matmul(a, b)
    assert (product.dtype, product.shape) == (np.float32, (5, 4, 4))
    assert cublas.calls == ["create", "stream", "workspace", "math", "gemm"]


def test_a_handle_is_made_once_a_stream_and_keeps_its_workspace(cublas: FakeCublas) -> None:
    a = DeviceArray(np.ones((4, 4), np.float32))
    for stream in (7, 7, 9):
        sys.modules["cupy"].stream = stream
        matmul(a, a)
    once = ["create", "stream", "workspace", "math"]
    assert cublas.calls == [*once, "gemm", "gemm", *once, "gemm"]
    assert cublas.stream == 9
    assert cublas.workspace_bytes == WORKSPACE_BYTES == 33554432
    assert cublas.math_mode == 16  # no sum of partial sums below float32


def arrays(*shapes: Any, dtypes: tuple[Any, ...] = (np.float32,) * 3) -> list[DeviceArray]:
    return [DeviceArray(np.ones(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize(
    ("out", "a", "b"),
    [
        ((2, 3), (2, 4), (5, 3)),
        ((2, 4), (2, 4), (4, 3)),
        ((3, 2), (2, 4), (4, 3)),
        ((2, 2, 3), (3, 2, 4), (2, 4, 3)),
        ((2, 3), (2, 2, 4), (4, 3)),
        ((1, 2, 2, 3), (1, 2, 2, 4), (4, 3)),
    ],
)
def test_shapes_that_do_not_chain_are_an_error(out: Any, a: Any, b: Any) -> None:
    with pytest.raises(ShapeError, match="expected"):
        matmul_into(*arrays(out, a, b))


def test_an_array_that_is_no_matrix_in_memory_is_an_error() -> None:
    out, a, b = arrays((2, 3), (2, 4), (4, 3))
    scattered = DeviceArray(np.ones((4, 8), np.float32)[::2, ::2])
    with pytest.raises(ShapeError, match="a: expected contiguous rows or columns"):
        matmul_into(out, scattered, b)
    repeated = DeviceArray(np.broadcast_to(np.ones(4, np.float32), (2, 4)))
    with pytest.raises(ShapeError, match="a: expected contiguous rows or columns"):
        matmul_into(out, repeated, b)
    with pytest.raises(ShapeError, match="out: expected contiguous rows"):
        matmul_into(DeviceArray(np.ones((3, 2), np.float32).T), a, b)


@pytest.mark.parametrize(
    "dtypes",
    [
        (np.float32, np.float32, bfloat16),
        (bfloat16, np.float32, np.float32),
        (np.float64, np.float64, np.float64),
        (np.float16, bfloat16, bfloat16),
    ],
)
def test_dtypes_that_cublas_does_not_mix_are_an_error(dtypes: tuple[Any, ...]) -> None:
    with pytest.raises(DeviceError, match="both float32 or both bfloat16"):
        matmul_into(*arrays((2, 3), (2, 4), (4, 3), dtypes=dtypes))


def test_a_refusal_of_cublas_is_told(cublas: FakeCublas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublas, "cublasGemmEx", lambda *arguments: 13)
    with pytest.raises(DeviceError, match="cublasGemmEx: status 13, a kernel failed to run"):
        matmul_into(*arrays((2, 3), (2, 4), (4, 3)))


def test_an_empty_product_asks_for_nothing(cublas: FakeCublas) -> None:
    handle = Cublas(cublas, 7, DeviceArray(np.empty(64, np.uint8)))
    handle.matmul_into(*arrays((0, 3), (0, 4), (4, 3)), scale=1.0, accumulate=False)
    assert "gemm" not in cublas.calls
