"""cuBLAS by ctypes: products of row-major matrices on the GPU, summed in float32.

CuPy's own door to cuBLAS multiplies no batches of bfloat16, and refuses to work while a stream is captured.
Here every stream has a handle and a workspace of its own that are made once: a product allocates nothing, can
be captured into a graph, and gives the same bits in every run.

Source: cuBLAS documentation, https://docs.nvidia.com/cuda/cublas: cublasGemmEx, cublasGemmStridedBatchedEx,
cublasSetWorkspace, cublasMath_t; library_types.h for the types.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lora.backend import toolkit
from lora.backend.arrays import Array
from lora.backend.device import cupy_module
from lora.backend.dtypes import bfloat16
from lora.errors import DeviceError, ShapeError

WORKSPACE_BYTES = 32 * 2**20  # what the documentation recommends for Hopper; Ampere needs 4 MiB

TYPES = {np.dtype("float32"): 0, bfloat16: 14}  # CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F = 68  # sums in float32, and takes float32 operands as they are, not as TF32
DEFAULT_ALGORITHM = -1
# also what is summed apart and then added (split-K) stays in float32 until the end
DISALLOW_REDUCED_PRECISION_REDUCTION = 16

STATUS = {
    1: "not initialised: no GPU, or no driver",
    3: "the GPU's memory is exhausted",
    7: "an argument is not valid",
    8: "not available on a GPU of this architecture",
    11: "the GPU's memory could not be accessed",
    13: "a kernel failed to run",
    14: "an internal operation failed",
    15: "not supported",
    16: "the licence was not accepted",
}


class Matrix(NamedTuple):
    """An array [..., rows, columns] as cuBLAS is told of it."""

    address: int
    transposed: bool  # the buffer holds the array's transpose, row by row
    leading: int  # elements between the buffer's rows, which are cuBLAS's columns
    stride: int  # elements between the matrices of a stack; 0 for one matrix that all share
    dtype: np.dtype[Any]


class Cublas:
    """A handle of cuBLAS, bound to one stream and one workspace for as long as it lives."""

    def __init__(self, library: Any, stream: int, workspace: Array) -> None:
        self._library = library
        self._workspace = workspace  # held: cuBLAS keeps its address alone
        self._handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
        # after the stream: setting a stream takes a workspace away
        address = ctypes.c_void_p(workspace.data.ptr)
        self._call("cublasSetWorkspace_v2", self._handle, address, ctypes.c_size_t(workspace.nbytes))
        self._call("cublasSetMathMode", self._handle, DISALLOW_REDUCED_PRECISION_REDUCTION)

    def matmul_into(self, out: Array, a: Array, b: Array, *, scale: float, accumulate: bool) -> None:
        """Write scale · a @ b into `out`, or add it; each element is summed in float32 and rounded once.

        Args:
            out: [M, N] or [B, M, N], float32, or bfloat16 where a and b are; its rows are contiguous.
            a: [M, K], or [B, M, K]; float32 or bfloat16. A transpose or a cut of columns is taken as it is.
            b: [K, N], or [B, K, N]; dtype of `a`.
            scale: of the product.
            accumulate: add to what `out` holds.

        Raises:
            ShapeError: the shapes do not chain, or an array is not laid out as a matrix.
            DeviceError: of the dtypes, or from cuBLAS.
        """
        if out.size == 0:
            return
        size = _size(out, a, b)
        x, y, z = (_matrix(name, array) for name, array in (("a", a), ("b", b), ("out", out)))
        _check_types(x.dtype, y.dtype, z.dtype)
        if z.transposed:
            raise ShapeError(f"out: expected contiguous rows, got strides {out.strides}")
        # to cuBLAS a row-major matrix is its own transpose, so it is asked for outᵀ = bᵀ aᵀ
        alpha, beta = ctypes.byref(ctypes.c_float(scale)), ctypes.byref(ctypes.c_float(accumulate))
        batched = out.ndim == 3
        self._call(
            "cublasGemmStridedBatchedEx" if batched else "cublasGemmEx",
            self._handle,
            *(int(y.transposed), int(x.transposed)),
            *size,
            alpha,
            *_operand(y, batched),
            *_operand(x, batched),
            beta,
            *_operand(z, batched),
            *((out.shape[0],) if batched else ()),
            COMPUTE_32F,
            DEFAULT_ALGORITHM,
        )

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise DeviceError(f"{function}: status {status}, {STATUS.get(status, 'unknown to this version')}")


def current_cublas() -> Cublas:
    """Return the handle of CuPy's current device and stream.

    Raises:
        DeviceError: there is no GPU, or cuBLAS is not installed.
    """
    cupy = cupy_module()
    return _cublas(cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)


@cache
def _cublas(device: int, stream: int) -> Cublas:
    workspace = cupy_module().empty(WORKSPACE_BYTES, np.uint8)
    return Cublas(_library(), stream, workspace)


@cache
def _library() -> ctypes.CDLL:
    # cublasLt first: cuBLAS asks the loader for it by bare name
    toolkit.load(toolkit.library("cublasLt"), ctypes.RTLD_GLOBAL)
    return toolkit.load(toolkit.library("cublas"))


def _operand(matrix: Matrix, batched: bool) -> tuple[Any, ...]:
    """Return how one matrix is passed: address, type, leading dimension, and the stride of a stack."""
    passed = (ctypes.c_void_p(matrix.address), TYPES[matrix.dtype], matrix.leading)
    return (*passed, ctypes.c_longlong(matrix.stride)) if batched else passed


def _size(out: Array, a: Array, b: Array) -> tuple[int, int, int]:
    """Return m, n and k as cuBLAS counts them: the columns of out, its rows, and what is summed over."""
    stacks = {array.shape[:-2] for array in (out, a, b)} - {()}
    if out.ndim not in (2, 3) or stacks - {out.shape[:-2]}:
        raise ShapeError(f"expected one matrix or one stack of them, got {_shapes(out, a, b)}")
    (rows, inner), (also_inner, columns) = a.shape[-2:], b.shape[-2:]
    if inner != also_inner or out.shape[-2:] != (rows, columns):
        raise ShapeError(f"expected out [M, N], a [M, K], b [K, N], got {_shapes(out, a, b)}")
    return columns, rows, inner


def _shapes(out: Array, a: Array, b: Array) -> str:
    return f"out {list(out.shape)}, a {list(a.shape)}, b {list(b.shape)}"


def _matrix(name: str, array: Array) -> Matrix:
    rows, columns = array.shape[-2:]
    strides = [stride // array.itemsize for stride in array.strides]
    stride = strides[0] if array.ndim == 3 else 0
    # the stride along an axis of one element says nothing
    along_rows, along_columns = (strides[-2] if rows > 1 else None, strides[-1] if columns > 1 else None)
    for transposed, step, apart, width in (
        (False, along_columns, along_rows, columns),
        (True, along_rows, along_columns, rows),
    ):
        leading = max(1, width if apart is None else apart)
        if step in (1, None) and leading >= width:
            return Matrix(array.data.ptr, transposed, leading, stride, array.dtype)
    raise ShapeError(
        f"{name}: expected contiguous rows or columns, got {list(array.shape)}, strides {strides}"
    )


def _check_types(a: np.dtype[Any], b: np.dtype[Any], out: np.dtype[Any]) -> None:
    if a != b or a not in TYPES or out not in (a, np.float32):
        raise DeviceError(
            f"expected a and b both float32 or both bfloat16, and out that or float32; got {a}, {b} and {out}"
        )
