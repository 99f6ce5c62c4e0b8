"""Memory that is used again: only once nothing refers to it, and never more of it than was in use at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lora.backend import empty, memory

LARGE = (1024, 512)  # twice the least that is pooled, in float32


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


def place(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_taken_again_when_the_last_view_of_it_is_gone() -> None:
    array = empty(LARGE, np.float32)
    first, view = place(array), array.T[3:].view(np.int32)
    del array
    other = empty(LARGE, np.float32)
    assert place(other) != first
    del view
    assert place(empty(LARGE, np.float32)) == first


def test_arrays_start_at_a_cache_line_and_can_be_written() -> None:
    array = empty(LARGE, np.float32)
    assert place(array) % memory.ALIGNMENT == 0
    assert array.flags.writeable
    assert array.flags.c_contiguous


@pytest.mark.parametrize(
    ("elements", "fits"), [(2**19, True), (450_000, True), (400_000, False), (530_000, False)]
)
def test_a_chunk_serves_what_nearly_fills_it(elements: int, fits: bool) -> None:
    array = empty(LARGE, np.float32)
    del array
    chunk = memory._free[0]
    assert (memory._take(4 * elements) is chunk) is fits


def test_sizes_that_go_out_of_use_are_given_back() -> None:
    for rows in range(1000, 9000, 1000):
        array = empty((rows, 512), np.float32)
        del array
    assert sum(chunk.size for chunk in memory._free) <= 8000 * 512 * 4 + memory.ALIGNMENT


def test_release_leaves_nothing() -> None:
    array = empty(LARGE, np.float32)
    memory.scratch(100, np.float32)
    del array
    memory.release()
    assert memory._free == []
    assert vars(memory._scratch) == {}


def test_scratch_is_one_array_a_dtype() -> None:
    first, second = memory.scratch(10, np.float32), memory.scratch(8, np.float32)
    assert place(first) == place(second)
    assert (second.size, memory.scratch(8, np.float64).dtype) == (8, np.float64)
