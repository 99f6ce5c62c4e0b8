"""What the outputs of a benchmark's calls must be: the NumPy reference, on the same rounded arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.registry import Calls, Inputs, bench, draw
from lora.backend import bfloat16, wide


def stored(inputs: Inputs, place: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Return the arrays in the dtypes that training stores them in, each as `place` gives it back."""
    rounded = {name: array.astype(bfloat16) for name, array in inputs.stored.items()}
    return {name: place(array) for name, array in (rounded | inputs.exact).items()}


def calls_of(room: str, operation: str, arrays: Mapping[str, Any]) -> Calls:
    """Return the calls of an operation as `room` implements it: "lora.cuda", or the reference "lora.ops"."""
    return bench(operation).calls(import_module(f"{room}.{operation}"), arrays)


def expected(operation: str, shape: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Return every output of every call, "call output", in float32."""

    def widened(array: np.ndarray) -> np.ndarray:
        return wide(array) if array.dtype == bfloat16 else array

    calls = calls_of("lora.ops", operation, stored(draw(operation, shape, seed), widened))
    return {
        f"{name} {output}": np.array(array, np.float32)  # a copy: a call may be made for what it changes
        for name, call in calls.items()
        for output, array in call().items()
    }
