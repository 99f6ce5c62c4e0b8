"""Which BLAS NumPy runs on: its kernels and its threads decide the last bits of every product."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np


@cache
def blas_facts() -> dict[str, str | int | None]:
    """Return {"library", "core", "threads"}: core and threads are None where the BLAS does not say.

    NumPy's own wheels bring an OpenBLAS whose symbols carry the prefix read here.
    """
    build = np.show_config(mode="dicts")
    library = build["Build Dependencies"]["blas"]["name"] if isinstance(build, dict) else "unknown"
    for path in sorted((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*")):
        blas = ctypes.CDLL(str(path))
        core, threads = blas.scipy_openblas_get_corename64_, blas.scipy_openblas_get_num_threads64_
        core.restype = ctypes.c_char_p
        return {"library": library, "core": core().decode(), "threads": threads()}
    return {"library": library, "core": None, "threads": None}
