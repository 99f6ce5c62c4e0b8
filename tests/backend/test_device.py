"""What reaches CuPy, and what is said where there is no CuPy or no GPU that will do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora.backend import Kernel, bfloat16, device, launch
from lora.backend.cubin_cache import cached_cubin
from lora.backend.device import current_gpu
from lora.errors import DeviceError, KernelError
from tests.backend.fake_cupy import DeviceArray, FakeCupy
from tests.conftest import pytest_configure

SOURCE = """
#include <cuda_bf16.h>
extern __shared__ unsigned char dyn_smem[];
template <typename T>
__global__ void scale(const T* x, float* y, const float* bias, long long n, float s)
{
    if (threadIdx.x < n) y[threadIdx.x] = s * (float)x[threadIdx.x] + (bias ? bias[0] : 0.0f);
}
"""
SCALE = Kernel("scale.cu", "scale<__nv_bfloat16>", 96, 50_000)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Start and leave without what was remembered of the fake GPU."""
    yield
    device._gpu.cache_clear()
    device._function.cache_clear()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, kernels: Path) -> FakeCupy:
    (kernels / "scale.cu").write_text(SOURCE)
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def arguments() -> list[Any]:
    return [DeviceArray(np.ones(8, bfloat16)), DeviceArray(np.ones(8, np.float32)), None, 8, 2.0]


def test_a_launch_passes_arrays_and_scalars_of_the_declared_width(cupy: FakeCupy) -> None:
    x, y, *rest = arguments()
    launch(SCALE, (3, 2), x, y, *rest)
    (function,) = cupy.loaded
    ((grid, block, passed, shared),) = function.launches
    assert (grid, block, shared) == ((3, 2, 1), (96, 1, 1), 50_000)
    assert passed[:2] == (x, y)
    assert [(type(value), value) for value in passed[2:]] == [(np.uintp, 0), (np.int64, 8), (np.float32, 2.0)]


def test_a_kernel_is_loaded_once_from_the_cache_with_its_shared_memory_allowed(cupy: FakeCupy) -> None:
    for _ in range(3):
        launch(SCALE, (1,), *arguments())
    (function,) = cupy.loaded
    assert len(function.launches) == 3
    assert function.max_dynamic_shared_size_bytes == 50_000
    cubin = cached_cubin("scale.cu", SCALE.name, "sm_90")
    assert (function.path, function.symbol) == (str(cubin.path), cubin.symbol)


def test_arguments_are_checked_on_the_device_too(cupy: FakeCupy) -> None:
    x, y, *rest = arguments()
    with pytest.raises(KernelError, match="parameter x: expected an array of bfloat16, got float32"):
        launch(SCALE, (1,), y, y, *rest)
    with pytest.raises(DeviceError, match="one library"):
        launch(SCALE, (1,), x, y.host, *rest)
    assert cupy.loaded == []


def test_shared_memory_beyond_the_gpu_is_an_error(cupy: FakeCupy) -> None:
    with pytest.raises(
        DeviceError, match=r"needs 232,449 bytes of shared memory; a block of Fake H100 has at most"
    ):
        launch(SCALE._replace(shared_bytes=232_449), (1,), *arguments())


def test_the_facts_of_a_gpu(cupy: FakeCupy) -> None:
    gpu = current_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.arch) == ("Fake H100", "9.0", "sm_90")
    assert (gpu.shared_bytes, gpu.memory_bytes) == (232_448, 80 * 2**30)


def test_a_gpu_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(name=b"Tesla T4", major=7, minor=5))
    with pytest.raises(
        DeviceError, match=r"Tesla T4 has compute capability 7\.5; the kernels need 8\.0 or newer"
    ):
        current_gpu()


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"needs CuPy: pip install 'lora-numpy\[cuda13\]'"):
        current_gpu()


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (0, "needs an NVIDIA GPU: no driver was found"),
        (12080, r"the driver serves CUDA 12, and CuPy is built for CUDA 13; pip install .*\[cuda12\]"),
        (13000, "the driver shows none"),
    ],
)
def test_without_a_gpu_the_error_says_why(
    monkeypatch: pytest.MonkeyPatch, driver: int, expected: str
) -> None:
    fake = FakeCupy()
    fake.cuda.is_available = lambda: False
    fake.cuda.runtime.driverGetVersion = lambda: driver
    monkeypatch.setitem(sys.modules, "cupy", fake)
    with pytest.raises(DeviceError, match=expected):
        current_gpu()


def test_asking_for_gpu_tests_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(pytest.UsageError, match="--gpu: device 'cuda' needs CuPy"):
        pytest_configure(SimpleNamespace(getoption=lambda name: name == "--gpu"))
    pytest_configure(SimpleNamespace(getoption=lambda name: False))
