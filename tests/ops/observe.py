"""What an operation does beside its result: memory it takes, inputs it leaves alone, calls it refuses."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.harness.counted_memory import counted_memory


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most memory that `run` held at once, over what was there before; NumPy reports its own."""
    tracemalloc.start()
    try:
        with counted_memory():
            run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_unchanged(arrays: Mapping[str, Any], run: Callable[[], Any]) -> None:
    """Fail if `run` changes a bit of `arrays`; None stands for an array that is absent."""
    before = {name: array.tobytes() for name, array in arrays.items() if array is not None}
    run()
    changed = [name for name, bits in before.items() if arrays[name].tobytes() != bits]
    assert not changed, f"changed in place: {changed}"


def assert_refused(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    """Fail unless `call` raises `error` with `words` in its message."""
    refusal = None
    try:
        call()
    except error as raised:
        refusal = raised
    assert refusal is not None, f"expected {error.__name__}, and nothing was raised"
    assert words in str(refusal), f"the message lacks {words!r}: {refusal}"


def random_boundaries(rng: np.random.Generator, sequences: int, longest: int) -> np.ndarray:
    """Return cu_seqlens [S+1] of `sequences` sequences of 1 to `longest` tokens, the last of `longest`."""
    lengths = rng.integers(1, longest + 1, sequences)
    lengths[-1] = longest
    return np.concatenate([[0], np.cumsum(lengths)])
