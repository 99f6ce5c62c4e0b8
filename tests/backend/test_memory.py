"""Memory that is used again: only once nothing refers to it, cut and joined, and given back when unused."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import empty, memory
from lora.backend.memory import POOLED_BYTES, Pool

LARGE = (1024, 512)  # twice the least that is pooled, in float32
SLAB = 10 * 2**20


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLAB_BYTES", SLAB)


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
    array = empty((1025, 513), np.float32)
    array[...] = 1
    assert place(array) % memory.ALIGNMENT == 0
    assert place(empty(LARGE, np.float32)) % memory.ALIGNMENT == 0
    assert array.flags.writeable
    assert array.flags.c_contiguous


@pytest.mark.usefixtures("small_slabs")
def test_what_neighbours_leave_serves_a_larger_array() -> None:
    pool = Pool()
    parts = [pool.take(SLAB // 5) for _ in range(5)]
    held, middle = pool.held_bytes, place(parts[1])
    del parts[1:4]
    assert place(pool.take(3 * (SLAB // 5))) == middle
    assert pool.held_bytes == held


@pytest.mark.usefixtures("small_slabs")
def test_the_smallest_gap_that_suffices_is_cut() -> None:
    pool = Pool()
    parts = [pool.take(rows * 2**20) for rows in (3, 1, 2, 1, 3)]
    gap = place(parts[2])
    del parts[0], parts[1]  # 3 MB at the start, and 2 MB between the others
    assert place(pool.take(2**20 + 1)) == gap


@pytest.mark.usefixtures("small_slabs")
def test_slabs_that_are_too_small_make_room_for_a_larger_one() -> None:
    pool = Pool()
    for size in range(SLAB, 4 * SLAB, SLAB // 2):
        array = pool.take(size)
        assert pool.held_bytes <= size
        del array


@pytest.mark.usefixtures("small_slabs")
@given(st.lists(st.tuples(st.integers(1, 2 * SLAB), st.booleans()), max_size=40))
def test_no_two_arrays_share_a_byte_and_all_comes_back(steps: list[tuple[int, bool]]) -> None:
    pool, alive = Pool(), []
    for size, frees in steps:
        array = pool.take(size)
        array[:1], array[-1:] = 1, 1
        alive.append(array)
        if frees:
            del alive[len(alive) // 2]
        del array
        spans = sorted((place(each), place(each) + each.size) for each in alive)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    alive.clear()
    pool.release()
    assert pool.held_bytes == 0


def test_an_array_may_die_while_another_one_is_cut() -> None:
    pool = Pool()
    ring: list[object] = [pool.take(POOLED_BYTES)]
    ring.append(ring)  # the collector alone can free it
    del ring
    with pool._lock:
        gc.collect()
    assert len(pool._returned) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_waits_for_no_thread_of_its_parent() -> None:
    with memory._pool._lock:  # as if another thread were in the pool
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            empty(LARGE, np.float32)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_release_leaves_what_is_in_use() -> None:
    array = empty(LARGE, np.float32)
    array[...] = 7
    memory.scratch(100, np.float32)
    memory.release()
    assert memory._pool.held_bytes == memory.SLAB_BYTES
    assert (array == 7).all()
    del array
    memory.release()
    assert memory._pool.held_bytes == 0
    assert vars(memory._scratch) == {}


def test_scratch_is_one_array_a_dtype() -> None:
    first, second = memory.scratch(10, np.float32), memory.scratch(8, np.float32)
    assert place(first) == place(second)
    assert (second.size, memory.scratch(8, np.float64).dtype) == (8, np.float64)
