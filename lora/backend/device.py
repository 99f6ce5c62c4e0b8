"""The GPU: what it is, and the engine that runs kernels on it. CuPy is imported here, at the first use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora.backend.arrays import Array
from lora.backend.cubin_cache import cached_cubin
from lora.errors import DeviceError

if TYPE_CHECKING:  # kernel.py imports this file when it launches on a device
    from lora.backend.kernel import Kernel

OLDEST_ARCH = 80  # the first with bfloat16 tensor cores and asynchronous copies to shared memory
EXTRAS = "pip install 'lora-numpy[cuda13]' (or [cuda12] for a driver older than 580)"


class Gpu(NamedTuple):
    """What one GPU can do."""

    name: str
    compute_capability: str  # "9.0"
    arch: str  # as compilers name it: "sm_90"
    shared_bytes: int  # the largest dynamic shared memory of one block
    memory_bytes: int


def cupy_module() -> Any:
    """Return CuPy, which works on a GPU that is there.

    Raises:
        DeviceError: CuPy is not installed or does not load, or it finds no GPU or driver.
    """
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DeviceError(f"device 'cuda' needs CuPy: {EXTRAS}; importing it says: {error}") from error
    if not cupy.cuda.is_available():
        runtime = cupy.cuda.runtime
        raise DeviceError(_no_gpu(runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    return cupy


def _no_gpu(driver: int, runtime: int) -> str:
    """Return why no GPU is there, from the CUDA versions of the driver, 0 without one, and of CuPy."""
    needed = f"CuPy is built for CUDA {runtime // 1000}"
    if driver == 0:
        return f"device 'cuda' needs an NVIDIA GPU: no driver was found ({needed})"
    if driver // 1000 < runtime // 1000:
        return f"device 'cuda': the driver serves CUDA {driver // 1000}, and {needed}; {EXTRAS}"
    return "device 'cuda' needs an NVIDIA GPU: the driver shows none (is CUDA_VISIBLE_DEVICES empty?)"


def current_gpu() -> Gpu:
    """Return the GPU that CuPy works on.

    Raises:
        DeviceError: there is none, or it is older than the kernels allow.
    """
    return _gpu(cupy_module().cuda.runtime.getDevice())


@cache
def _gpu(device: int) -> Gpu:
    properties = cupy_module().cuda.runtime.getDeviceProperties(device)
    major, minor = properties["major"], properties["minor"]
    name = properties["name"].decode()
    if 10 * major + minor < OLDEST_ARCH:
        raise DeviceError(
            f"{name} has compute capability {major}.{minor}; the kernels need {OLDEST_ARCH / 10} or newer"
        )
    return Gpu(
        name,
        f"{major}.{minor}",
        f"sm_{major}{minor}",
        properties["sharedMemPerBlockOptin"],
        properties["totalGlobalMem"],
    )


def on_device(array: np.ndarray, device: str) -> Array:
    """Return the host's `array` where the operations of `device`, "cpu" or "cuda", read it.

    Raises:
        DeviceError: there is no GPU.
    """
    return array if device == "cpu" else cupy_module().asarray(array)


class DeviceEngine:
    """Runs kernels on CuPy's current device and stream; each is compiled and loaded at its first launch."""

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Run `kernel`, whose arguments are checked already, over `grid` blocks."""
        function = _function(kernel, cupy_module().cuda.runtime.getDevice())
        function(grid, (kernel.threads, 1, 1), tuple(values), shared_mem=kernel.shared_bytes)


@cache
def _function(kernel: Kernel, device: int) -> Any:
    """Return the kernel as CuPy launches it, allowed the shared memory that it needs."""
    gpu = _gpu(device)
    if kernel.shared_bytes > gpu.shared_bytes:
        raise DeviceError(
            f"{kernel.name} needs {kernel.shared_bytes:,} bytes of shared memory; a block of {gpu.name} has "
            f"at most {gpu.shared_bytes:,}"
        )
    cubin = cached_cubin(kernel.file, kernel.name, gpu.arch)
    function = cupy_module().RawModule(path=str(cubin.path)).get_function(cubin.symbol)
    if kernel.shared_bytes:
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function
