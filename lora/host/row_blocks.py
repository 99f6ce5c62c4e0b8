"""One function over all rows of some arrays, a block at a time, so that what it works on stays in a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

from lora.backend import Array, accumulation_dtype, run_all
from lora.backend.threads import thread_count
from lora.host.scratch_arrays import scratch_arrays

BLOCK_ELEMENTS = 2**18  # of an array at most: blocks stay in the caches, and calls long beside Python's lock
WHOLE_ELEMENTS = 2**17  # what one thread has done before another one is awake


def over_rows(
    function: Callable[..., Any],
    outputs: Sequence[Array],
    inputs: Sequence[Array],
    *,
    temporaries: int = 0,
) -> None:
    """Call `function(*outputs, *inputs, *temporaries)` for block after block of rows, on all threads.

    Every block comes in the accumulation dtype: that of a narrower input is widened, and that of a narrower
    output is rounded when the function returns.

    Args:
        function: reads and writes blocks; it sees each row once.
        outputs: written, [N, ...]; none is wider than the first.
        inputs: read, of as many rows and no wider.
        temporaries: how many more blocks of the first output's shape the function may write over.
    """
    dtype, blocks = accumulation_dtype(outputs[0].dtype), row_blocks(outputs[0])
    narrow = sum(array.dtype != dtype for array in (*outputs, *inputs))

    def run(block: slice) -> None:
        largest = outputs[0][blocks[0]].size
        spare = iter(scratch_arrays(dtype, *[(largest,)] * (narrow + temporaries)))

        def like(block: Array) -> Array:
            return next(spare)[: block.size].reshape(block.shape)

        ins = [x[block] if x.dtype == dtype else _copied(x[block], like(x[block])) for x in inputs]
        outs = [y[block] if y.dtype == dtype else like(y[block]) for y in outputs]
        function(*outs, *ins, *(like(outs[0]) for _ in range(temporaries)))
        for y, out in zip(outputs, outs, strict=True):
            if y.dtype != dtype:
                y[block] = out

    run_all([partial(run, block) for block in blocks])


def _copied(block: Array, out: Array) -> Array:
    out[...] = block
    return out


def row_blocks(array: Array) -> list[slice]:
    """Return slices that cover the rows of `array` [N, ...]: one, or as many for each thread."""
    blocks = 1 if array.size <= WHOLE_ELEMENTS else thread_count()
    blocks *= ceil(array.size / (blocks * BLOCK_ELEMENTS))
    step = max(1, ceil(len(array) / max(1, blocks)))
    return [slice(start, min(start + step, len(array))) for start in range(0, len(array), step)]
