"""The operations that `kernels` measures: one file each, which states shapes, arguments, bytes and FLOP.

Nothing here imports an array library but NumPy: the same files describe the work to every contestant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np

Calls = Mapping[str, Callable[[], dict[str, Any]]]  # by name of the call; each returns its outputs by name

# and what their arrays are stored in
OPERATIONS = {
    "rmsnorm": "bfloat16",
    "rope": "bfloat16",
    "swiglu": "bfloat16",
    "embedding": "bfloat16",
    "pool": "bfloat16",
    "softmax_xent": "bfloat16",
    "attention": "bfloat16",
    "cached_attention": "bfloat16",
    "lowrank_linear": "bfloat16",
    "adamw": "float32",
}


class Inputs(NamedTuple):
    """The arguments of an operation, before a contestant has them in its own arrays."""

    stored: dict[str, np.ndarray]  # float32 here; every contestant rounds it to bfloat16
    exact: dict[str, np.ndarray]  # taken as it is: ids, boundaries, and what is float32 in training


class Work(NamedTuple):
    """What one call must do at least, whoever does it."""

    bytes: int  # every input read once, every output written once
    flops: int


class Bench(Protocol):
    """A file `bench_<operation>.py`."""

    SHAPES: tuple[Any, ...]  # NamedTuples of axis letters, from published models

    @staticmethod
    def inputs(shape: Any, rng: np.random.Generator) -> Inputs:
        """Return the arguments and the random cotangents."""

    @staticmethod
    def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
        """Return what is timed, of `operation`, a module with the functions of `lora.ops.<operation>`."""

    @staticmethod
    def work(shape: Any) -> dict[str, Work]:
        """Return the work of every call."""


def bench(operation: str) -> Any:
    """Return the `Bench` of an operation."""
    return import_module(f"benchmarks.bench_{operation}")


def draw(operation: str, shape: Mapping[str, int], seed: int) -> Inputs:
    """Return the same arguments for the same shape and seed, in every process."""
    found = bench(operation)
    return found.inputs(type(found.SHAPES[0])(**shape), np.random.default_rng(seed))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return float32 standard normal numbers."""
    return rng.standard_normal(shape, np.float32)
