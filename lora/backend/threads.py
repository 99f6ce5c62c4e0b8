"""Work that NumPy does on one thread, shared out over as many threads as the BLAS has.

NumPy lets go of Python's lock inside its loops. While the threads work, a matrix product stays on the thread
that asks for it: no core is given out twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

from lora.backend.blas import blas_facts, one_thread_a_product

_inside = threading.local()


@cache
def thread_count() -> int:
    """Return how many threads share the work: as many as the BLAS has, and 1 where it does not say."""
    return int(blas_facts()["threads"] or 1)


def inside_a_task() -> bool:
    """Return whether this thread runs one of several tasks: what it calls shares nothing out again."""
    return getattr(_inside, "task", False)


def run_all(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run every task on whichever thread is free; no task may read or write what another one writes.

    Raises:
        Exception: whatever a task raised; others may have run or not, and none runs any more.
    """
    remaining = iter(tasks)  # a list's iterator gives nothing twice: Python's lock is held while it moves

    def work() -> None:
        _inside.task = True
        try:
            for task in remaining:
                task()
        finally:
            _inside.task = False

    if len(tasks) < 2 or thread_count() < 2 or inside_a_task():
        for task in remaining:
            task()
        return
    with one_thread_a_product():
        others = [_pool().submit(work) for _ in range(min(thread_count(), len(tasks)) - 1)]
        try:
            work()
        finally:
            wait(others)  # all of them: after an error too, none may write any more when the caller goes on
        for other in others:
            other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_count() - 1, thread_name_prefix="lora")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
