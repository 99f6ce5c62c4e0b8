"""Which instance of a kernel template serves an array, and arrays as kernels take them."""

from __future__ import annotations

from typing import Any

from lora.backend import Array, array_module, beside
from lora.errors import UnsupportedError

CPP_TYPES = {"bfloat16": "__nv_bfloat16", "float32": "float"}
PACK_BYTES = 16  # what a thread reads at once


def contiguous(array: Array | None, dtype: Any = None) -> Array | None:
    """Return `array` C-contiguous and in `dtype` (its own without one), as kernels read it; None stays."""
    return None if array is None else array_module(array).ascontiguousarray(array, dtype)


def geometry(numbers: Array, other: Array) -> Array:
    """Return ids or boundaries, which may lie on the host, as kernels on `other` read them: int64."""
    return contiguous(beside(numbers, other), "int64")


def cpp_type(operation: str, array: Array) -> str:
    """Return the C++ name of `array`'s elements.

    Raises:
        UnsupportedError: the kernels of `operation` have no instance for them.
    """
    name = str(array.dtype)
    if name not in CPP_TYPES:
        raise UnsupportedError(f"{operation} on a GPU: expected {' or '.join(CPP_TYPES)}; got {name}")
    return CPP_TYPES[name]


def pack_blocks(array: Array, threads: int) -> tuple[int]:
    """Return the grid that has a thread for every pack of `array`."""
    return (-(-array.nbytes // (PACK_BYTES * threads)),)
