"""The BLAS that NumPy runs on: what it is, how many threads it takes, and the products NumPy has no call for.

Its kernels and its threads decide the last bits of every product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # enum values of the C interface
_C_TYPES = {np.dtype("float32"): ("s", ctypes.c_float), np.dtype("float64"): ("d", ctypes.c_double)}


def blas_facts() -> dict[str, str | int | None]:
    """Return {"library", "core", "threads"}: core and threads are None where the BLAS does not say."""
    build = np.show_config(mode="dicts")
    library = build["Build Dependencies"]["blas"]["name"] if isinstance(build, dict) else "unknown"
    blas = _openblas()
    if blas is None:
        return {"library": library, "core": None, "threads": None}
    core = blas.scipy_openblas_get_corename64_().decode()
    return {"library": library, "core": core, "threads": blas.scipy_openblas_get_num_threads64_()}


@dataclass
class _Callers:
    """Who runs products on one thread at this moment: the number of threads is the whole process's."""

    lock: Lock = field(default_factory=Lock)
    count: int = 0
    threads: int = 1  # before the first of them came


_callers = _Callers()


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Run every product on the thread that asks for it, until the block ends; under an OpenBLAS alone."""
    blas = _openblas()
    if blas is None:
        yield
        return
    with _callers.lock:
        if _callers.count == 0:
            _callers.threads = blas.scipy_openblas_get_num_threads64_()
            blas.scipy_openblas_set_num_threads64_(1)
        _callers.count += 1
    try:
        yield
    finally:
        with _callers.lock:
            _callers.count -= 1
            if _callers.count == 0:
                blas.scipy_openblas_set_num_threads64_(_callers.threads)


def gemm(out: np.ndarray, a: np.ndarray, b: np.ndarray, *, scale: float, accumulate: bool) -> bool:
    """Write scale · a @ b into `out` [M, N], or add it, without a temporary: NumPy's own call does neither.

    Returns:
        Whether that was done: not under another BLAS than OpenBLAS, nor on arrays that it cannot read as
        they lie.
    """
    blas, kind = _openblas(), _C_TYPES.get(out.dtype)
    places = [place for array in (out, a, b) if (place := _place(array)) is not None]
    if blas is None or kind is None or a.dtype != out.dtype or b.dtype != out.dtype or len(places) < 3:
        return False
    (c_order, c_lead), (a_order, a_lead), (b_order, b_lead) = places
    if c_order != _PLAIN or out.size == 0 or a.shape[1] == 0:
        return False
    letter, real = kind
    getattr(blas, f"scipy_cblas_{letter}gemm64_")(
        *map(ctypes.c_int, (_ROW_MAJOR, a_order, b_order)),
        *map(ctypes.c_int64, (*out.shape, a.shape[1])),
        *(real(scale), ctypes.c_void_p(a.ctypes.data), ctypes.c_int64(a_lead)),
        *(ctypes.c_void_p(b.ctypes.data), ctypes.c_int64(b_lead), real(accumulate)),
        *(ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(c_lead)),
    )
    return True


def _place(matrix: np.ndarray) -> tuple[int, int] | None:
    """Return (order, elements from one row to the next) of a matrix as it lies; None where BLAS cannot."""
    if matrix.ndim != 2:
        return None
    for order, (rows, columns), (far, near) in (
        (_PLAIN, matrix.shape, matrix.strides),
        (_TRANSPOSED, matrix.shape[::-1], matrix.strides[::-1]),
    ):
        lead, rest = divmod(far, matrix.itemsize)
        if rows == 1:  # its stride means nothing
            lead, rest = columns, 0
        if (near == matrix.itemsize or columns == 1) and rest == 0 and lead >= columns:
            return order, max(lead, 1)
    return None


@cache
def _openblas() -> Any:
    """Return the OpenBLAS of NumPy's own wheels, whose symbols carry a prefix; None under another BLAS."""
    for path in sorted((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*")):
        blas = ctypes.CDLL(str(path))
        blas.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
        return blas
    return None
