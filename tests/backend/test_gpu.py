"""The backend on a GPU: launches, products, streams and capture, against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.backend import Kernel, bfloat16, launch, linear, linear_transpose, matmul, matmul_into, to_host
from lora.backend.device import current_gpu
from tests.backend.test_device import SCALE, SOURCE

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy() -> Any:
    import cupy

    return cupy


def test_a_kernel_computes_from_what_it_was_passed(cupy: Any, kernels: Path) -> None:
    (kernels / "scale.cu").write_text(SOURCE)
    x, y = cupy.arange(8, dtype=np.float32).astype(bfloat16), cupy.zeros(8, np.float32)
    launch(SCALE, (1,), x, y, None, 8, 2.0)
    np.testing.assert_array_equal(to_host(y), 2.0 * np.arange(8))
    launch(SCALE, (1,), x, y, cupy.ones(1, np.float32), 5, 3.0)
    np.testing.assert_array_equal(to_host(y), [1, 4, 7, 10, 13, 10, 12, 14])


def test_all_the_shared_memory_of_a_block_can_be_had(cupy: Any, kernels: Path) -> None:
    (kernels / "far.cu").write_text(
        "extern __shared__ unsigned char dyn_smem[];\n"
        "__global__ void far(int* y, int last)\n"
        "{ dyn_smem[last] = 7; __syncthreads(); y[0] = dyn_smem[last]; }\n"
    )
    whole, y = current_gpu().shared_bytes, cupy.zeros(1, np.int32)
    launch(Kernel("far.cu", "far", 32, whole), (1,), y, whole - 1)
    assert int(y[0]) == 7


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 48, 96), (257, 130, 66)])
def test_products_agree_with_float64(cupy: Any, dtype: Any, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    m, n, k = shape
    x, weight, dy = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (n, k), (m, n)))
    on_device = [cupy.asarray(array) for array in (x, weight, dy)]
    wide = [array.astype("float64") for array in (x, weight, dy)]
    for found, expected in (
        (linear(on_device[0], on_device[1]), wide[0] @ wide[1].T),
        (linear_transpose(on_device[2], on_device[1]), wide[2] @ wide[1]),
        (matmul(on_device[2].T, on_device[0]), wide[2].T @ wide[0]),
    ):
        assert found.dtype == np.float32
        assert np.linalg.norm(to_host(found) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_stack_of_products_and_accumulation(cupy: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (3, 16, 16)).astype(bfloat16) for _ in range(2))
    out = cupy.ones((3, 16, 16), np.float32)
    matmul_into(out, cupy.asarray(a), cupy.asarray(b), scale=0.5, accumulate=True)
    np.testing.assert_array_equal(to_host(out), 1 + 0.5 * (a.astype("float32") @ b.astype("float32")))


def test_float32_is_not_rounded_to_tf32(cupy: Any) -> None:
    a = cupy.full((16, 16), 1 + 2.0**-12, np.float32)
    np.testing.assert_array_equal(to_host(matmul(a, cupy.eye(16, dtype=np.float32))), to_host(a))


def test_products_and_launches_can_be_captured_and_replayed(cupy: Any, kernels: Path) -> None:
    (kernels / "scale.cu").write_text(SOURCE)
    x, y = cupy.ones(8, bfloat16), cupy.zeros((1, 8), np.float32)
    matrix, out = cupy.eye(8, dtype=np.float32), cupy.zeros((1, 8), np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        # the first calls compile, load, and make the handle, none of which can be captured
        launch(SCALE, (1,), x, y, None, 8, 2.0)
        matmul_into(out, y, matrix)
        stream.begin_capture()
        launch(SCALE, (1,), x, y, None, 8, 2.0)
        matmul_into(out, y, matrix)
        graph = stream.end_capture()
        x[...] = 3
        graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(to_host(out), np.full((1, 8), 6.0))
