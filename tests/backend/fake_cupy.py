"""As much of CuPy as the backend touches, over memory of the host: what is passed can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np


class DeviceArray:
    """An array that the library must take for CuPy's, and can read only through its address."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        if name not in ("dtype", "shape", "ndim", "size", "nbytes", "itemsize", "strides", "flags"):
            raise AttributeError(name)
        return getattr(self.host, name)

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self.host[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[key] = value

    @property
    def T(self) -> DeviceArray:  # noqa: N802  (NumPy's name)
        return DeviceArray(self.host.T)

    def astype(self, dtype: Any, *, copy: bool = True) -> DeviceArray:
        return self if not copy and dtype == self.host.dtype else DeviceArray(self.host.astype(dtype))


DeviceArray.__module__ = "cupy"

PROPERTIES = {
    "name": b"Fake H100",
    "major": 9,
    "minor": 0,
    "sharedMemPerBlockOptin": 232448,
    "totalGlobalMem": 80 * 2**30,
}


class FakeCupy(SimpleNamespace):
    """A module `cupy` with one GPU; `loaded` keeps the functions that were loaded, in order."""

    def __init__(self, **properties: Any) -> None:
        self.loaded: list[Function] = []
        self.stream = 7
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            getDeviceProperties=lambda device: PROPERTIES | properties,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13020,
        )
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            runtime=runtime,
            get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
        )

    def empty(self, shape: Any, dtype: Any) -> DeviceArray:
        return DeviceArray(np.empty(shape, dtype))

    def RawModule(self, path: str) -> Any:  # noqa: N802  (CuPy's name)
        return SimpleNamespace(get_function=lambda symbol: Function(path, symbol, self.loaded.append))


class Function:
    """A loaded kernel that keeps its launches."""

    def __init__(self, path: str, symbol: str, announce: Callable[[Function], None]) -> None:
        self.path, self.symbol = path, symbol
        self.max_dynamic_shared_size_bytes = 0
        self.launches: list[Any] = []
        announce(self)

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
        self.launches.append((grid, block, args, shared_mem))
