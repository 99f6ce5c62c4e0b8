"""The head and its loss in chunks of rows, on a GPU: cuBLAS makes the logits, a kernel loss and gradient.

The logits are float32. Where the head and its input are both bfloat16, their gradient is too, in the first
half of the same memory, so that the second product runs on the tensor cores like the first.

Contract: contracts/ops/softmax_xent.yaml. Source: kernels/softmax_xent.cu; the reference is
lora/ops/softmax_xent.py.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from lora.backend import (
    Array,
    Kernel,
    array_module,
    bfloat16,
    empty,
    launch,
    linear,
    linear_transpose,
    matmul,
    matmul_into,
    to_host,
    wide,
)
from lora.cuda._instances import CPP_TYPES, contiguous, cpp_type
from lora.ops.softmax_xent import (
    CHUNK_BYTES,
    IGNORED,
    Grads,
    Head,
    Outcome,
    Saved,
    backward,
    check_arguments,
    chunk_rows,
    zero_grads,
)

__all__ = ["KERNELS", "backward", "forward"]

_FILE = "softmax_xent.cu"
_THREADS = 512
_SCATTER_THREADS = 128
_PACK = 8  # elements of a thread


def _rows_kernel(gradient: str, bias: str) -> Kernel:
    return Kernel(_FILE, f"xent_rows<{gradient}, {bias}, {_THREADS}>", _THREADS)


def _scatter_kernel(out: str) -> Kernel:
    return Kernel(_FILE, f"scatter_rows<{out}, {_SCATTER_THREADS}>", _SCATTER_THREADS)


KERNELS = (
    *(_rows_kernel(*each) for each in product(CPP_TYPES.values(), CPP_TYPES.values())),
    *map(_scatter_kernel, CPP_TYPES.values()),
)


def forward(
    hidden: Array,
    weight: Array,
    targets: Array,
    bias: Array | None = None,
    row_weights: Array | None = None,
    *,
    normalizer: float,
    label_smoothing: float = 0.0,
    wants_gradient: bool = True,
    wants_weight: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Outcome, Saved]:
    """Return the loss, the number of correct rows, and what backward hands out; arguments as the reference's.

    `targets` and `row_weights` may lie on the host: which rows count is decided there.
    """
    targets, row_weights = (None if a is None else to_host(a) for a in (targets, row_weights))
    head = Head(weight, contiguous(bias))
    check_arguments(hidden, head, targets, row_weights, normalizer, label_smoothing)
    xp, counted = array_module(hidden, weight, bias), np.flatnonzero(targets != IGNORED)
    shares = np.ones(counted.size, np.float32) if row_weights is None else row_weights[counted]
    rows = xp.asarray(counted.astype(np.int32))
    aims = xp.asarray(targets[counted].astype(np.int32))
    shares = xp.asarray((shares / normalizer).astype(np.float32))
    losses, correct = (empty(counted.shape, dtype, like=hidden) for dtype in ("float32", "int32"))
    grads = zero_grads(hidden, head, wants_weight) if wants_gradient else None
    gradient, kernel = _instance(hidden, head)
    step = chunk_rows(counted.size, 4 * len(weight), chunk_bytes)
    for start in range(0, counted.size, step):
        chunk = slice(start, start + step)
        inputs = hidden[rows[chunk]]
        logits = linear(inputs, weight)
        found = (losses[chunk], correct[chunk])
        settings = (label_smoothing, wants_gradient, len(weight))
        launch(kernel, (len(logits),), logits, head.bias, aims[chunk], shares[chunk], *found, *settings)
        if grads is not None:
            # a narrow row fills half of a wide one
            dlogits = logits.view(gradient)[:, : len(weight)]
            _add_gradients(grads, rows[chunk], inputs, dlogits, weight)
    # one wait for the device, after all chunks
    return Outcome(float(to_host(losses).sum(dtype=np.float64)), int(to_host(correct).sum())), Saved(grads)


def _instance(hidden: Array, head: Head) -> tuple[Any, Kernel]:
    """Return the dtype of the gradient of the logits, and the kernel that writes it."""
    gradient = bfloat16 if hidden.dtype == head.weight.dtype == bfloat16 else np.dtype(np.float32)
    cpp = CPP_TYPES[str(gradient)]
    return gradient, _rows_kernel(cpp, cpp if head.bias is None else cpp_type("softmax_xent", head.bias))


def _add_gradients(grads: Grads, rows: Array, inputs: Array, dlogits: Array, weight: Array) -> None:
    dhidden, columns = linear_transpose(dlogits, weight), -(-weight.shape[1] // (_SCATTER_THREADS * _PACK))
    kernel = _scatter_kernel(cpp_type("softmax_xent", grads.hidden))
    launch(kernel, (len(rows), columns), dhidden, rows, grads.hidden, weight.shape[1])
    if grads.bias is not None:
        ones = array_module(dlogits).ones((1, len(rows)), dlogits.dtype)
        grads.bias[...] += matmul(ones, dlogits)[0]
    if grads.weight is not None:
        inputs = inputs if inputs.dtype == dlogits.dtype else wide(inputs)
        matmul_into(grads.weight, dlogits.T, inputs, accumulate=True)
