"""One step of AdamW over all trained arrays, on a GPU: three launches, whatever their number; float32.

A table of addresses goes to the device in one small copy. The norm, and the factor that clips by it, are made
and read there; the host waits once, for the norm that is returned.

Contract: contracts/ops/adamw.yaml. Source: kernels/adamw.cu; the reference is lora/ops/adamw.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora.backend import Array, Kernel, address, beside, empty, launch, to_host
from lora.errors import UnsupportedError
from lora.ops.adamw import check_layout, scalars_of

__all__ = ["KERNELS", "step"]

_FILE = "adamw.cu"
_CHUNK = 4096  # elements of a block
_THREADS = 256
_SQUARES = Kernel(_FILE, f"adamw_squares<{_THREADS}, {_CHUNK}>", _THREADS)
_NORM = Kernel(_FILE, "adamw_norm<1024>", 1024)
_UPDATE = Kernel(_FILE, f"adamw_update<{_THREADS}, {_CHUNK}>", _THREADS)

KERNELS = (_SQUARES, _NORM, _UPDATE)


def step(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    moments: Sequence[tuple[Array, Array]],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float = 0.0,
) -> float:
    """Move every parameter by one step, in place; return the joint norm of the gradients, before clipping.

    Where the norm is not finite, nothing is moved. Arguments as the reference's.

    Raises:
        ShapeError: the arrays of a parameter differ in shape or dtype, or one is not C-contiguous.
        UnsupportedError: they are not float32.
    """
    check_layout(parameters, gradients, moments)
    _check_dtypes(parameters)
    if not parameters:
        return 0.0
    rows, chunks = _table(parameters, gradients, moments)
    table = beside(rows, parameters[0])
    squares, norm = (empty((size,), "float32", like=parameters[0]) for size in (chunks, 2))
    arrays = len(parameters)
    launch(_SQUARES, (chunks,), table, squares, arrays)
    launch(_NORM, (1,), squares, norm, clip, chunks)
    by = scalars_of(step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    decays = (by.beta1, 1 - by.beta1, by.beta2, 1 - by.beta2)
    launch(
        _UPDATE, (chunks,), table, norm, by.keep, *decays, by.eps, by.step_size, by.root_correction, arrays
    )
    return float(to_host(norm)[0])


def _check_dtypes(parameters: Sequence[Array]) -> None:
    wrong = sorted({str(array.dtype) for array in parameters} - {"float32"})
    if wrong:
        raise UnsupportedError(f"adamw on a GPU: expected float32; got {', '.join(wrong)}")


def _table(
    parameters: Sequence[Array], gradients: Sequence[Array], moments: Sequence[tuple[Array, Array]]
) -> tuple[np.ndarray, int]:
    """Return ([T, 6] int64: four addresses, a size and the first chunk of each array, the sum of chunks)."""
    sizes = np.array([array.size for array in parameters], np.int64)
    chunks = -(-sizes // _CHUNK)
    places = [
        [address(array) for array in (parameter, gradient, *both)]
        for parameter, gradient, both in zip(parameters, gradients, moments, strict=True)
    ]
    return np.column_stack([np.array(places, np.int64), sizes, chunks.cumsum() - chunks]), int(chunks.sum())
