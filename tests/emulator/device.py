"""A GPU that is not there: CuPy over memory of the host, its kernels on the emulator, its products by hand.

    with emulated_device(seed=7) as device:
        model = lora.load(folder, device="cuda", dtype="bfloat16")

The library runs the code that it runs on a GPU, launchers and cuBLAS binding included. The arrays are as
strict as CuPy's: they mix with none of NumPy's, and `to_host` alone gets them back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

import lora.backend.cublas
import lora.backend.device
from lora.backend.kernel import Kernel
from tests.backend.fake_cublas import FakeCublas
from tests.backend.fake_cupy import FakeCupy
from tests.emulator.engine import Edit, Emulator

COPIES = ("array", "asarray")  # the functions that take an array of NumPy's


class EmulatedArray(np.lib.mixins.NDArrayOperatorsMixin):
    """An array on the device that is not there."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy asks for protocols, which would let it read the memory
            raise AttributeError(name)
        value = getattr(self.host, name)
        return _on_device(value) if callable(value) else _wrapped(value)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        return _on_device(getattr(ufunc, method))(*inputs, **settings)

    def __array__(self, *arguments: Any, **settings: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __iter__(self) -> Any:
        raise TypeError("each element of a loop over an array of the device would wait for the device")

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key: Any) -> Any:
        return _wrapped(self.host[_inside(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[_inside(key)] = _inside(value)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __int__(self) -> int:
        return int(self.host)

    def __float__(self) -> float:
        return float(self.host)


EmulatedArray.__module__ = "cupy"


class EmulatedCupy(FakeCupy):
    """The module: its functions are NumPy's, between arrays of the device alone."""

    def __getattr__(self, name: str) -> Any:
        return _on_device(getattr(np, name))

    def empty(self, shape: Any, dtype: Any) -> EmulatedArray:
        return EmulatedArray(np.empty(shape, dtype))

    def array(self, array: Any, dtype: Any = None) -> EmulatedArray:
        """Return a copy: nothing that is written on the device shows in memory of the host."""
        return EmulatedArray(np.array(getattr(array, "host", array), dtype, order="C"))

    def asarray(self, array: Any, dtype: Any = None) -> EmulatedArray:
        same = isinstance(array, EmulatedArray) and dtype in (None, array.dtype)
        return array if same else self.array(array, dtype)

    def asnumpy(self, array: EmulatedArray) -> np.ndarray:
        return array.host.copy()


class EmulatedEngine:
    """Launches kernels as `lora.backend.device.DeviceEngine` does."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.launched: set[str] = set()

    def __call__(self) -> EmulatedEngine:
        return self

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        self.launched.add(kernel.file)
        self._emulator.launch(kernel, grid, [_inside(value) for value in values])


@contextmanager
def emulated_device(seed: int = 0, edits: Sequence[Edit] = ()) -> Iterator[EmulatedEngine]:
    """Give the library a GPU until the block ends; `seed` orders threads, `edits` plant bugs in kernels."""
    engine, products, caches = EmulatedEngine(Emulator(seed, edits=edits)), FakeCublas(), _caches()
    with (
        patch.dict(sys.modules, cupy=EmulatedCupy()),
        patch.object(lora.backend.device, "DeviceEngine", engine),
        patch.object(lora.backend.cublas, "_library", lambda: products),
    ):
        for cache in caches:
            cache.cache_clear()
        try:
            yield engine
        finally:
            for cache in caches:
                cache.cache_clear()


def _caches() -> tuple[Any, ...]:
    return lora.backend.device._gpu, lora.backend.cublas._cublas


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        inside = {name: _inside(value) for name, value in settings.items()}
        return _wrapped(function(*map(_inside, arguments), **inside))

    return call


def _inside(value: Any) -> Any:
    """Return what NumPy works on in the place of `value`, which is no array of its own."""
    if isinstance(value, np.ndarray):
        raise TypeError(f"unsupported type {type(value)}: an array of the host beside one of the device")
    if isinstance(value, tuple | list):
        return type(value)(map(_inside, value))
    return value.host if isinstance(value, EmulatedArray) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return EmulatedArray(value)
    # what NumPy gives as a number stays an array on a device
    return EmulatedArray(np.asarray(value)) if isinstance(value, np.generic) else value
