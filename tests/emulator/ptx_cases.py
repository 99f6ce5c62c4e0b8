"""What each wrapper of kernels/ptx.cuh is asked: on a GPU to record its answer, emulated to check it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from lora.backend import bfloat16, to_host
from lora.backend.kernel import Kernel, launch

SOURCES = Path(__file__).parent / "kernels"
RECORD = Path(__file__).parent / "ptx_golden.npz"


class PtxCase(NamedTuple):
    """One launch of a kernel of kernels/semantics.cu."""

    kernel: str
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]  # as they are before the launch
    blocks: int = 1
    shared_bytes: int = 0
    tolerance: float = 0.0  # relative to the largest of 1 and the answer; 0: to the bit


def cases() -> dict[str, PtxCase]:
    """Return the cases by name; the same ones every time."""
    rng = np.random.default_rng(2024)
    a, b, square = (rng.standard_normal(shape).astype(bfloat16) for shape in ((16, 16), (16, 8), (16, 16)))
    d = rng.standard_normal((16, 8)).astype("float32")
    floats = (rng.standard_normal(1024) * 10.0 ** rng.integers(-30, 31, 1024)).astype("float32")
    exponents = np.linspace(-150, 127, 1024, dtype="float32")
    words = rng.integers(0, 2**32, 128, dtype=np.uint32)
    # a tensor core may add products in another order, and cut what it aligns
    return {
        "mma": PtxCase("multiply", (a, b), (d,), tolerance=2e-6),
        "ldmatrix_mma": PtxCase(
            "multiply_by_ldmatrix", (a, square), (_zeros(16, 16),), shared_bytes=1024, tolerance=2e-6
        ),
        "ldmatrix": PtxCase(
            "load_matrices",
            (rng.integers(0, 2**16, 256, dtype=np.uint16),),
            (np.zeros(256, np.uint32),),
            shared_bytes=512,
        ),
        "cp_async": PtxCase(
            "copy_and_wait", (rng.standard_normal(256).astype("float32"),), (_zeros(256),), shared_bytes=1024
        ),
        "cp_async_8": PtxCase(
            "copy_pairs_and_wait",
            (rng.standard_normal(64).astype("float32"),),
            (_zeros(64),),
            shared_bytes=256,
        ),
        "exp2": PtxCase("exponentials", (exponents,), (_zeros(1024),), blocks=32, tolerance=2.5e-7),
        "pack_bf16": PtxCase("pack_pairs", (floats,), (np.zeros(512, np.uint32),), blocks=16),
        "packs": PtxCase("copy_packs", (words,), (np.zeros(128, np.uint32), np.zeros(128, np.uint32))),
    }


def answers(case: PtxCase, moved: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, ...]:
    """Launch `case` with arrays as `moved` makes them, and return its outputs."""
    inputs, outputs = (tuple(moved(array) for array in arrays) for arrays in (case.inputs, case.outputs))
    launch(Kernel("semantics.cu", case.kernel, 32, case.shared_bytes), (case.blocks,), *inputs, *outputs)
    return tuple(map(to_host, outputs))


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@contextmanager
def kernels_of_tests() -> Iterator[None]:
    """Let signatures and sources be read from this folder's kernels instead of the library's."""
    with ExitStack() as stack:
        for module in ("signature", "nvrtc", "cubin_cache"):
            name = f"lora.backend.{module}.asset"
            stack.enter_context(patch(name, lambda *parts: SOURCES.joinpath(*parts[1:])))
        yield
