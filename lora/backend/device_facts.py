"""What a machine has of CUDA, told without failing where it has nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

from lora.backend import nvrtc, toolkit
from lora.backend.cubin_cache import cache_folder
from lora.backend.device import current_gpu
from lora.errors import LoraError


class DeviceFacts(NamedTuple):
    """What device "cuda" finds; None for what is not there."""

    cuda_driver: str | None  # the newest CUDA that the NVIDIA driver serves: "13.0"
    nvrtc: str | None  # the compiler's release: "13.0"
    cublas: str | None  # the library's file
    gpu: str | None  # its name
    compute_capability: str | None  # "9.0"
    gpu_memory_gb: float | None  # 10^9 bytes
    kernel_cache: str  # the folder of compiled kernels
    cuda_problems: list[str]  # what is missing, and how to mend it; empty where device "cuda" is ready


def device_facts() -> DeviceFacts:
    """Return what this machine has of CUDA."""
    problems: list[str] = []
    gpu = _unless_missing(current_gpu, problems)
    release = _unless_missing(nvrtc.version, problems)
    cublas = _unless_missing(lambda: toolkit.library("cublas").name, problems)
    if release is not None:
        _unless_missing(lambda: toolkit.headers(release[0]), problems)
    return DeviceFacts(
        cuda_driver=_driver(),
        nvrtc=release and f"{release[0]}.{release[1]}",
        cublas=cublas,
        gpu=gpu and gpu.name,
        compute_capability=gpu and gpu.compute_capability,
        gpu_memory_gb=gpu and round(gpu.memory_bytes / 1e9, 1),
        kernel_cache=str(cache_folder()),
        cuda_problems=problems,
    )


def _unless_missing(read: Callable[[], Any], problems: list[str]) -> Any:
    try:
        return read()
    except LoraError as error:
        problems.append(str(error))
        return None


def _driver() -> str | None:
    """Return the CUDA release that the driver serves; asked of the driver itself, which needs no CuPy."""
    number = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else None
