"""Which array library an array belongs to, and the one way back to the host.

CuPy is never imported here: a CuPy array in hand proves that somebody imported it already.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from lora.errors import DeviceError

Array = Any  # np.ndarray or cupy.ndarray; CuPy ships no shape-aware stubs to say more


def array_module(*arrays: Array) -> Any:
    """Return the one library that every array belongs to; None stands for an array that is absent.

    Raises:
        DeviceError: the arrays come from two libraries, or from an unknown one. Nothing is ever copied
            between devices on the caller's behalf.
    """
    if all(array is None or isinstance(array, np.ndarray) for array in arrays):
        return np
    owners = {type(array).__module__.partition(".")[0] for array in arrays if array is not None}
    if owners == {"cupy"}:
        return sys.modules["cupy"]
    raise DeviceError(f"expected arrays of one library, numpy or cupy; got {sorted(owners)}")


def to_host(array: Array) -> np.ndarray:
    """Return `array` as a NumPy array; the only way from a device to the host."""
    module: ModuleType = array_module(array)
    return array if module is np else module.asnumpy(array)


def address(array: Array) -> int:
    """Return where the first element of `array` lies, in the memory of its own device."""
    return array.ctypes.data if array_module(array) is np else array.data.ptr


def beside(array: Array, other: Array) -> Array:
    """Return the host's `array` in the library of `other`; the only way from the host to a device."""
    module = array_module(other)
    return array if array_module(array) is module else module.asarray(array)
