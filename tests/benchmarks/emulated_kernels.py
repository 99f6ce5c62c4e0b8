"""A worker of `kernels` for tests: kernels on the emulator, and a clock whose times are made up.

"torch" computes the reference; "liger" refuses; "sdpa-flash" computes something else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.kernel_reference import calls_of, stored
from benchmarks.registry import Calls, Inputs
from benchmarks.workers.kernel_serving import serve_kernels
from lora.backend.kernel import using_engine
from tests.emulator.engine import Emulator

MICROSECONDS = {"lora": 10.0, "torch": 25.0}
RATES = {"copy": 1e9, "gemm": 1e12}


class Clock:
    """Says of every call what `MICROSECONDS` says of its contestant."""

    contestant = "lora"

    def mark(self) -> None: ...

    def flush(self) -> None: ...

    def wait(self) -> None: ...

    def seconds(self, start: Any, stop: Any) -> float:
        return MICROSECONDS.get(self.contestant, 10.0) / 1e6


class Emulated:
    """See `Side`."""

    refusals = (ImportError,)

    def __init__(self) -> None:
        self.device = Clock()

    def facts(self) -> dict[str, Any]:
        return {"versions": {"emulator": "1"}}

    def calls(self, contestant: str, operation: str, arrays: Inputs) -> Calls:
        if contestant == "liger":
            raise ImportError("No module named 'liger_kernel'")
        self.device.contestant = contestant
        calls = calls_of(
            "lora.cuda" if contestant == "lora" else "lora.ops", operation, stored(arrays, np.array)
        )
        if contestant != "sdpa-flash":
            return calls
        return calls | {"forward": lambda: {name: 1.1 * x for name, x in calls["forward"]().items()}}

    def to_host(self, array: Any) -> np.ndarray:
        return np.asarray(array, np.float32)

    def release(self) -> None: ...


if __name__ == "__main__":
    with using_engine(Emulator(1)):
        serve_kernels(Emulated(), rates=lambda: RATES)
