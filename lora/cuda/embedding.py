"""Rows of a table by index, on a GPU; the gradient adds in the order of the tokens, without atomics.

Contract: contracts/ops/embedding.yaml. Source: kernels/embedding.cu; the reference is lora/ops/embedding.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from lora.backend import Array, Kernel, empty, launch
from lora.cuda._instances import CPP_TYPES, PACK_BYTES, contiguous, cpp_type, geometry
from lora.errors import DataError
from lora.ops.embedding import Grads, Saved

_THREADS = 128


def _forward(x: str, table: str) -> Kernel:
    return Kernel("embedding.cu", f"embedding_forward<{x}, {table}>", _THREADS)


def _backward(dx: str) -> Kernel:
    return Kernel("embedding.cu", f"embedding_backward<{dx}>", _THREADS)


KERNELS = (
    *(_forward(*types) for types in product(CPP_TYPES.values(), CPP_TYPES.values())),
    *map(_backward, CPP_TYPES.values()),
)


def forward(ids: Array, table: Array, *, dtype: Any) -> tuple[Array, Saved]:
    """Return rows `ids` [N] of `table` [V, D] as x [N, D] in `dtype`; all three bfloat16 or float32.

    Ids that lie on the host are checked there; of others, the range is read back from the device.

    Raises:
        DataError: an id is outside [0, V).
        UnsupportedError: there is no kernel for the dtypes.
    """
    (rows, width), low, high = table.shape, int(ids.min()), int(ids.max())
    if not 0 <= low <= high < rows:
        raise DataError(
            f"token ids must lie in [0, {rows}), the rows of the embedding table; found {low} to {high}: "
            "does the tokenizer belong to this model?"
        )
    ids, table = geometry(ids, table), contiguous(table)
    x = empty((len(ids), width), np.dtype(dtype), like=table)
    kernel = _forward(cpp_type("embedding", x), cpp_type("embedding", table))
    packs = -(-width // (PACK_BYTES // x.dtype.itemsize))
    launch(kernel, (len(ids), -(-packs // _THREADS)), ids, table, x, width)
    return x, Saved(ids, (rows, width))


def backward(saved: Saved, dx: Array) -> Grads:
    """Return the gradient for the whole table, given `dx` [N, D]; an id that occurs twice gets both rows."""
    ids, (rows, width) = saved
    dtable = empty((rows, width), "float32", like=dx)
    dtable[...] = 0
    grid = (len(ids), -(-width // _THREADS))
    launch(_backward(cpp_type("embedding", dx)), grid, ids, contiguous(dx), dtable, len(ids), width)
    return Grads(dtable)
