"""What a figure was measured on, and whether anything else was running meanwhile."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

NO_GPU = "no CUDA device"
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_FOREIGN = 0.05  # share of the processor that others may use before a figure counts as disturbed


def circumstances() -> dict[str, Any]:
    """Return machine, date and commit: what every record carries."""
    return {
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


@cache
def machine() -> dict[str, Any]:
    """Return the processor, its cores, the memory and the GPU. No name of the host: records are public."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e9, 1) if pages else None,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": cuda_device(),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Return the short hash of the checkout, with "+" where tracked files differ; None outside of one."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def cuda_device() -> str | None:
    """Return the name of the first CUDA device, or None, as the driver itself says."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    return None if driver.cuDeviceGetName(name, 256, 0) else name.value.decode()


@cache
def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None, as its management library says."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    version = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version)):
        return None
    return version.value.decode()


class Watch:
    """Says how much of the processor went to others since it was made; `own` is what the caller took."""

    def __init__(self) -> None:
        self.own = 0.0  # seconds of all cores together
        self._start, self._busy = time.perf_counter(), _busy_seconds()

    def foreign_share(self) -> float | None:
        """Return the share of all cores' time, in [0, 1]; None where no Linux tells."""
        now = _busy_seconds()
        if self._busy is None or now is None:
            return None
        passed = cores() * (time.perf_counter() - self._start)
        return min(1.0, max(0.0, now - self._busy - self.own) / passed)


def disturbed(foreign_share: float | None) -> bool:
    """Return whether others took so much of the processor that what was measured meanwhile is no figure."""
    return foreign_share is not None and foreign_share > _FOREIGN


def _busy_seconds() -> float | None:
    """Return the seconds that all cores together have worked so far; None where no Linux tells."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    line = path.read_text().partition("\n")[0]
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
