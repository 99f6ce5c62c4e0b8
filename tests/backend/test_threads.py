"""Work on all threads: everything runs once, an error comes out, and products keep to their thread."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from threading import Barrier, Event, Thread, current_thread, main_thread
from time import sleep

import pytest

from lora.backend import blas_facts, run_all, threads
from lora.backend.blas import one_thread_a_product


@pytest.fixture(params=[1, 2, 5])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(threads, "thread_count", lambda: request.param)
    threads._pool.cache_clear()
    yield request.param
    threads._pool.cache_clear()


@pytest.mark.parametrize("tasks", [0, 1, 2, 100])
def test_every_task_runs_once(count: int, tasks: int) -> None:
    ran: Counter[int] = Counter()
    run_all([partial(ran.update, [index]) for index in range(tasks)])
    assert ran == Counter(range(tasks))


def test_an_error_of_a_task_comes_out(count: int) -> None:
    def fail() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_all([fail] * 3)


def test_no_task_runs_any_more_when_an_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    threads._pool.cache_clear()
    all_have_one, failed, ended = Barrier(3, timeout=10), Event(), []

    def task() -> None:
        place = all_have_one.wait()
        if current_thread() is main_thread():
            return
        if current_thread().name.endswith("_0"):  # whose result is asked for first
            failed.set()
            raise ValueError("this one")
        failed.wait(10)
        sleep(0.05)
        ended.append(place)

    with pytest.raises(ValueError, match="this one"):
        run_all([task] * 3)
    assert len(ended) == 1
    threads._pool.cache_clear()


def test_callers_at_the_same_time_leave_the_products_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if blas_facts()["threads"] is None:
        pytest.skip("NumPy's BLAS does not say how many threads it takes")
    before, first_is_in, second_is_in = blas_facts()["threads"], Event(), Event()
    first = Thread(target=_products_on_one_thread, args=(first_is_in, second_is_in))
    first.start()
    first_is_in.wait()
    with one_thread_a_product():  # begins inside the first caller's, and outlives it
        second_is_in.set()
        first.join()
        assert blas_facts()["threads"] == 1
    assert blas_facts()["threads"] == before


def _products_on_one_thread(entered: Event, leave: Event) -> None:
    with one_thread_a_product():
        entered.set()
        leave.wait()


def test_a_task_shares_nothing_out_again(count: int) -> None:
    ran: Counter[int] = Counter()

    def task(index: int) -> None:
        run_all([partial(ran.update, [index])] * 5)

    run_all([partial(task, index) for index in range(10)])
    assert ran == Counter(dict.fromkeys(range(10), 5))
    assert not threads.inside_a_task()


def test_products_keep_to_their_thread_while_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if blas_facts()["threads"] is None:
        pytest.skip("NumPy's BLAS does not say how many threads it takes")
    before, seen = blas_facts()["threads"], set()
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    run_all([lambda: seen.add(blas_facts()["threads"])] * 4)
    assert seen == {1}
    assert blas_facts()["threads"] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_threads_of_its_own(count: int) -> None:
    run_all([int] * 4)
    child = os.fork()
    if child == 0:
        run_all([int] * 4)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
