"""Several arrays out of one thread's scratch memory, each at the start of a cache line."""

from __future__ import annotations

from math import prod
from typing import Any

from lora.backend import Array, scratch
from lora.backend.memory import ALIGNMENT


def scratch_arrays(dtype: Any, *shapes: tuple[int, ...]) -> list[Array]:
    """Return uninitialised arrays of `shapes`, for this thread until it asks for scratch again."""
    lanes = ALIGNMENT // dtype.itemsize
    sizes = [prod(shape) for shape in shapes]
    places = [-(-size // lanes) * lanes for size in sizes]
    flat = scratch(sum(places) + lanes, dtype)
    start = -flat.ctypes.data % ALIGNMENT // dtype.itemsize
    arrays = []
    for shape, size, place in zip(shapes, sizes, places, strict=True):
        arrays.append(flat[start : start + size].reshape(shape))
        start += place
    return arrays
