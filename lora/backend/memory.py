"""The one door for memory that an operation writes into: outputs and scratch.

On the host, arrays of a megabyte and more come from a pool: what one step's activations leave, the next
step's take. A fresh array costs the system a page fault for every page of it, a twentieth of a training step.
"""

from __future__ import annotations

import threading
import weakref
from math import prod
from typing import Any

import numpy as np

from lora.backend.arrays import Array, array_module

ALIGNMENT = 64  # bytes, of a cache line and of a vector
POOLED_BYTES = 2**20  # smaller arrays are as cheap from NumPy itself
LARGEST_WASTE = 1.25  # how many times larger than an array its chunk may be

_free: list[np.ndarray] = []  # oldest first
_lock = threading.Lock()
_scratch = threading.local()


def empty(shape: tuple[int, ...], dtype: Any, like: Array = None) -> Array:
    """Return an uninitialised C-contiguous array in the library of `like` (NumPy without one)."""
    return allocate(shape, dtype, like)


def allocate(shape: tuple[int, ...], dtype: Any, like: Array = None) -> Array:
    """Allocate, from the pool where it pays. Apart from `empty`, so that tests can poison what it returns."""
    module, dtype = np if like is None else array_module(like), np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    if module is not np or size < POOLED_BYTES:
        return module.empty(shape, dtype)
    chunk = _take(size)
    # over a memoryview, views of `owner` refer to it and not to the chunk: when it dies, none of them is left
    owner = np.frombuffer(chunk.data, np.uint8, size, offset=-chunk.ctypes.data % ALIGNMENT)
    weakref.finalize(owner, _free.append, chunk).atexit = False
    return owner.view(dtype).reshape(shape)


def scratch(size: int, dtype: Any) -> Array:
    """Return this thread's own [size] of `dtype`: whatever asks for it next writes over it."""
    held: dict[Any, Array] = _scratch.__dict__
    dtype = np.dtype(dtype)
    if dtype not in held or held[dtype].size < size:
        held[dtype] = np.empty(size, dtype)
    return held[dtype][:size]


def release() -> None:
    """Give what the pool holds back to the system, and this thread's scratch."""
    with _lock:
        _free.clear()
    _scratch.__dict__.clear()


def _take(size: int) -> np.ndarray:
    """Return a chunk of at least `size` bytes: the closest free one, or a new one in the place of others."""
    with _lock:
        least, most = size + ALIGNMENT, LARGEST_WASTE * size
        fits = [(chunk.size, i) for i, chunk in enumerate(_free) if least <= chunk.size <= most]
        if fits:
            return _free.pop(min(fits)[1])
        # no more is ever held than was in use at once: chunks of sizes that went out of use make room
        room = 0
        while _free and room < size:
            room += _free.pop(0).size
    return np.empty(size + ALIGNMENT, np.uint8)
