"""This library's side of `kernels`: `python -m benchmarks.workers.kernels_ours`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import lora
from benchmarks.device_time import FLUSHED_BYTES, device_seconds
from benchmarks.kernel_reference import calls_of, stored
from benchmarks.machine import driver_version
from benchmarks.registry import Calls, Inputs
from benchmarks.workers.kernel_serving import serve_kernels
from lora.backend import bfloat16, empty, matmul_into, to_host
from lora.backend.device import cupy_module, current_gpu

_COPIED_BYTES = 2**30
_GEMM_SIZE = 8192
_RUNS = 20


class CupyStream:
    """See `device_time.Device`."""

    def __init__(self, cupy: Any) -> None:
        self._cuda = cupy.cuda
        self._buffer = cupy.empty(FLUSHED_BYTES, np.uint8)

    def mark(self) -> Any:
        """See `Device`."""
        event = self._cuda.Event()
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """See `Device`."""
        stop.synchronize()
        return self._cuda.get_elapsed_time(start, stop) / 1e3

    def flush(self) -> None:
        """See `Device`."""
        self._buffer.data.memset_async(0, FLUSHED_BYTES)

    def wait(self) -> None:
        """See `Device`."""
        self._cuda.get_current_stream().synchronize()


class Ours:
    """The launchers of `lora.cuda` on the device."""

    refusals = ()  # every shape that is listed has a kernel

    def __init__(self) -> None:
        self._cupy = cupy_module()
        self.device = CupyStream(self._cupy)
        square = np.random.default_rng(0).standard_normal((_GEMM_SIZE, _GEMM_SIZE), np.float32)
        self._square = self._cupy.asarray(square.astype(bfloat16))

    def facts(self) -> dict[str, Any]:
        """See `Side`."""
        cupy, gpu = self._cupy, current_gpu()
        return {
            "versions": {
                "lora": lora.__version__,
                "numpy": np.__version__,
                "cupy": cupy.__version__,
                "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
                "driver": driver_version(),
                "python": sys.version.split()[0],
            },
            "arch": gpu.arch,
        }

    def rates(self) -> dict[str, float]:
        """Return {"copy", "gemm"}: bytes/s, read and written, of a copy of 1 GiB; FLOP/s of a square product.

        The product is of 8,192 in bfloat16, by the library's own door to cuBLAS.
        """
        cupy = self._cupy
        source, target = (cupy.zeros(_COPIED_BYTES, np.uint8) for _ in range(2))
        copying = device_seconds(lambda: cupy.copyto(target, source), self.device, _RUNS)
        source = target = None  # before the product is made
        a, product = self._square, empty(self._square.shape, bfloat16, like=self._square)
        multiplying = device_seconds(lambda: matmul_into(product, a, a), self.device, _RUNS)
        return {
            "copy": 2 * _COPIED_BYTES / float(np.median(copying)),
            "gemm": 2 * _GEMM_SIZE**3 / float(np.median(multiplying)),
        }

    def calls(self, contestant: str, operation: str, arrays: Inputs) -> Calls:
        """See `Side`."""
        return calls_of("lora.cuda", operation, stored(arrays, self._cupy.asarray))

    def to_host(self, array: Any) -> np.ndarray:
        """See `Side`."""
        return np.asarray(to_host(array), np.float32)

    def release(self) -> None:
        """See `Side`."""
        self._cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    ours = Ours()
    serve_kernels(ours, rates=ours.rates)
