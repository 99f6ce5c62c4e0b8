"""The one door for memory that an operation writes into: outputs and scratch.

On the host, arrays of a megabyte and more are cut from slabs, and what they leave is joined and cut again:
the memory of one step's activations serves the next step's, whatever their sizes. Fresh memory costs the
system a page fault and a page of zeros, a twentieth of a training step.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import insort
from collections import deque
from itertools import count
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from lora.backend.arrays import Array, array_module

ALIGNMENT = 64  # bytes, of a cache line and of a vector
POOLED_BYTES = 2**20  # smaller arrays are as cheap from NumPy itself
SLAB_BYTES = 2**28  # the system backs a page of it with memory when it is first written

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
    return _pool.take(size).view(dtype).reshape(shape)


def scratch(size: int, dtype: Any) -> Array:
    """Return this thread's own [size] of `dtype`: whatever asks for it next writes over it."""
    held: dict[Any, Array] = _scratch.__dict__
    dtype = np.dtype(dtype)
    if dtype not in held or held[dtype].size < size:
        held[dtype] = np.empty(size, dtype)
    return held[dtype][:size]


def release() -> None:
    """Give the slabs that nothing lies in back to the system, and this thread's scratch."""
    _pool.release()
    _scratch.__dict__.clear()


class _Span(NamedTuple):
    """Bytes of a slab that lie together; in the order of slabs and of places in them."""

    slab: int  # its number: older slabs have lower ones
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def touches(self, other: _Span) -> bool:
        return self.slab == other.slab and (self.start == other.stop or self.stop == other.start)


class Pool:
    """Slabs, and which of their bytes are free."""

    def __init__(self) -> None:
        self._slabs: dict[int, np.ndarray] = {}  # uint8, from an aligned address on
        self._numbers = count()
        self._free: list[_Span] = []  # in order; neighbours are joined
        # of arrays that died; the collector may run at any moment, in a thread that holds the lock too
        self._returned: deque[_Span] = deque()
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """Of all slabs, in use or not."""
        return sum(slab.size for slab in self._slabs.values())

    def take(self, size: int) -> np.ndarray:
        """Return [size] bytes that nothing else uses, until the last view of them is gone."""
        with self._lock:
            span = self._cut(-(-size // ALIGNMENT) * ALIGNMENT)
            slab = self._slabs[span.slab]
        # over a memoryview, views of `array` refer to it, not to the slab: when it dies, none of them is left
        array = np.frombuffer(slab.data, np.uint8, size, offset=span.start)
        weakref.finalize(array, self._returned.append, span).atexit = False
        return array

    def release(self) -> None:
        """Give back every slab that is free from end to end."""
        with self._lock:
            self._settle()
            for span in self._unused():
                self._drop(span)

    def renew_lock(self) -> None:
        """Forget who holds the lock."""
        self._lock = Lock()

    def _cut(self, size: int) -> _Span:
        """Take `size` bytes off the smallest free span that has them; of two alike, the older slab's."""
        self._settle()
        fits = [(span.size, span) for span in self._free if span.size >= size]
        span = min(fits)[1] if fits else self._add_slab(size)
        self._free.remove(span)
        cut = span._replace(stop=span.start + size)
        if cut.stop < span.stop:
            insort(self._free, span._replace(start=cut.stop))
        return cut

    def _settle(self) -> None:
        """Join what was returned with its free neighbours."""
        while self._returned:
            span = self._returned.popleft()
            for other in [other for other in self._free if span.touches(other)]:
                self._free.remove(other)
                span = span._replace(start=min(span.start, other.start), stop=max(span.stop, other.stop))
            insort(self._free, span)

    def _add_slab(self, size: int) -> _Span:
        """Return a new free span of at least `size` bytes."""
        size, room = max(size, SLAB_BYTES), 0
        for unused in self._unused():  # each is too small, and what is held would grow by the new one
            if room < size:
                self._drop(unused)
                room += unused.size
        memory = np.empty(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        span = _Span(next(self._numbers), 0, size)
        self._slabs[span.slab] = memory[start : start + size]
        insort(self._free, span)
        return span

    def _unused(self) -> list[_Span]:
        """Return the free spans that are whole slabs, oldest first."""
        return [span for span in self._free if span.size == self._slabs[span.slab].size]

    def _drop(self, unused: _Span) -> None:
        self._free.remove(unused)
        del self._slabs[unused.slab]


_pool = Pool()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.renew_lock)  # a thread that the child lacks may have held it
