"""Copies of arrays whose neighbours nobody may touch, for the time of one launch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.emulator.pages import map_memory, protect, unmap_memory

POISON = 0xFF  # every byte of it: NaN in each floating-point format


class OutOfBoundsError(Exception):
    """Bytes beside an array were written, on the same page."""


class _Span(NamedTuple):
    """Where an array lies."""

    begin: int
    end: int

    @classmethod
    def of(cls, array: np.ndarray) -> _Span:
        return cls(array.ctypes.data, array.ctypes.data + array.nbytes)

    def overlaps(self, other: _Span) -> bool:
        return self.begin < other.end and other.begin < self.end


class _Copy:
    """A copy of `array` between two pages without access, flush with one of them but for its alignment."""

    def __init__(self, array: np.ndarray, *, written: bool, at_end: bool) -> None:
        shift = array.ctypes.data % 16  # kept: on a device too the array is then as aligned as this one
        self._array, self._written = array, written
        self._body = -(-(array.nbytes + shift) // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        self._map = map_memory(self._body + 2 * mmap.PAGESIZE)
        begin = self._map + mmap.PAGESIZE
        protect(begin, self._body, mmap.PROT_READ | mmap.PROT_WRITE)
        self._bytes = np.ctypeslib.as_array((ctypes.c_ubyte * self._body).from_address(begin))
        self._bytes[...] = POISON
        self._offset = self._body - -(-(array.nbytes + shift) // 16) * 16 + shift if at_end else shift
        self.address = begin + self._offset
        self._own()[...] = np.frombuffer(array.reshape(-1).view(np.uint8), np.uint8)
        if not written:
            protect(begin, self._body, mmap.PROT_READ)

    def _own(self) -> np.ndarray:
        return self._bytes[self._offset : self._offset + self._array.nbytes]

    def copy_back(self) -> None:
        """Give the array what the kernel wrote.

        Raises:
            OutOfBoundsError: it wrote beside it too.
        """
        if not self._written:
            return
        beside = (self._bytes[: self._offset], self._bytes[self._offset + self._array.nbytes :])
        if any((part != POISON).any() for part in beside):
            raise OutOfBoundsError(f"bytes beside an array of {self._array.nbytes} were written")
        self._array.reshape(-1).view(np.uint8)[...] = self._own()

    def unmap(self) -> None:
        unmap_memory(self._map, self._body + 2 * mmap.PAGESIZE)


class Guarded:
    """The arguments of a launch as C values; arrays are copied in, and back where the kernel wrote.

    Raises:
        ValueError: two arrays overlap without being the same, and one of them is written.
    """

    def __init__(self, values: Sequence[Any], written: Sequence[bool], *, at_end: bool) -> None:
        self._copies: dict[_Span, _Copy] = {}
        self._values, self._at_end = values, at_end
        self._written: dict[_Span, bool] = {}
        for value, writes in zip(values, written, strict=True):
            if isinstance(value, np.ndarray):
                span = _Span.of(value)
                self._written[span] = self._written.get(span, False) or writes
        spans = list(self._written)
        for i, span in enumerate(spans):
            for other in spans[:i]:
                if span.overlaps(other) and (self._written[span] or self._written[other]):
                    raise ValueError("arguments overlap without being the same array, and one is written")

    def __enter__(self) -> list[Any]:
        return [self._boxed(value) for value in self._values]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                for copy in self._copies.values():
                    copy.copy_back()
        finally:
            for copy in self._copies.values():
                copy.unmap()

    def _boxed(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
        span = _Span.of(value)
        if span not in self._copies:
            self._copies[span] = _Copy(value, written=self._written[span], at_end=self._at_end)
        return ctypes.c_void_p(self._copies[span].address)
