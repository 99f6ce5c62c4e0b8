"""cuBLAS as its documentation describes it, on column-major matrices at addresses of the host."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from lora.backend import bfloat16

SUCCESS, INVALID_VALUE = 0, 7
REAL = {0: np.dtype("float32"), 14: bfloat16}
OPERATIONS = {0: "N", 1: "T"}


class FakeCublas:
    """The functions that the binding calls, doing what the documentation says; `calls` has their names."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stream = self.workspace_bytes = self.math_mode = 0

    def cublasCreate_v2(self, handle: Any) -> int:  # noqa: N802
        self.calls.append("create")
        handle._obj.value = 42
        return SUCCESS

    def cublasSetStream_v2(self, handle: Any, stream: Any) -> int:  # noqa: N802
        self.calls.append("stream")
        self.stream, self.workspace_bytes = stream.value, 0  # back to cuBLAS's own pool
        return SUCCESS

    def cublasSetWorkspace_v2(self, handle: Any, address: Any, size: Any) -> int:  # noqa: N802
        self.calls.append("workspace")
        assert address.value is not None
        self.workspace_bytes = size.value
        return SUCCESS

    def cublasSetMathMode(self, handle: Any, mode: int) -> int:  # noqa: N802
        self.calls.append("math")
        self.math_mode = mode
        return SUCCESS

    def cublasGemmEx(self, *arguments: Any) -> int:  # noqa: N802
        (
            handle,
            opa,
            opb,
            m,
            n,
            k,
            alpha,
            a,
            atype,
            lda,
            b,
            btype,
            ldb,
            beta,
            c,
            ctype,
            ldc,
            compute,
            algo,
        ) = arguments
        stacks = ((a, atype, lda, 0), (b, btype, ldb, 0), (c, ctype, ldc, 0))
        return self._gemm(handle, opa, opb, (m, n, k), alpha, *stacks[:2], beta, stacks[2], 1, compute, algo)

    def cublasGemmStridedBatchedEx(self, *arguments: Any) -> int:  # noqa: N802
        handle, opa, opb, m, n, k, alpha = arguments[:7]
        a, b, beta, c = arguments[7:11], arguments[11:15], arguments[15], arguments[16:20]
        count, compute, algo = arguments[20:]
        a, b, c = ((address, kind, leading, stride.value) for address, kind, leading, stride in (a, b, c))
        return self._gemm(handle, opa, opb, (m, n, k), alpha, a, b, beta, c, count, compute, algo)

    def _gemm(
        self,
        handle: Any,
        opa: int,
        opb: int,
        size: tuple[int, int, int],
        alpha: Any,
        a: Any,
        b: Any,
        beta: Any,
        c: Any,
        count: int,
        compute: int,
        algorithm: int,
    ) -> int:
        """C = alpha · op(A) op(B) + beta · C, where op(A) is m x k, op(B) is k x n, and C is m x n."""
        self.calls.append("gemm")
        m, n, k = size
        assert (handle.value, compute, algorithm) == (42, 68, -1)
        stored = (
            (m, k) if OPERATIONS[opa] == "N" else (k, m),
            (k, n) if OPERATIONS[opb] == "N" else (n, k),
            (m, n),
        )
        if min(size) < 0 or any(
            ld < max(1, rows) for (rows, _), (_, _, ld, _) in zip(stored, (a, b, c), strict=True)
        ):
            return INVALID_VALUE
        assert (a[1], c[1]) in {(0, 0), (14, 14), (14, 0)}
        assert a[1] == b[1]
        for index in range(count):
            left, right, out = (
                _column_major(x, shape, index) for x, shape in zip((a, b, c), stored, strict=True)
            )
            product = _op(opa, left).astype("float32") @ _op(opb, right).astype("float32")
            product *= alpha._obj.value
            if beta._obj.value != 0:  # C is not read otherwise
                product += beta._obj.value * out.astype("float32")
            out[...] = product
        return SUCCESS


def _op(operation: int, matrix: np.ndarray) -> np.ndarray:
    return matrix.T if OPERATIONS[operation] == "T" else matrix


def _column_major(operand: Any, shape: tuple[int, int], index: int) -> np.ndarray:
    """Return the matrix of `shape` that lies `index` strides after the address, columns `leading` apart."""
    address, kind, leading, stride = operand
    dtype, (rows, columns) = REAL[kind], shape
    if rows * columns == 0:
        return np.zeros(shape, dtype)
    span = leading * (columns - 1) + rows
    raw = (ctypes.c_char * (span * dtype.itemsize)).from_address(
        address.value + index * stride * dtype.itemsize
    )
    buffer = np.frombuffer(raw, dtype)
    return np.lib.stride_tricks.as_strided(buffer, shape, (dtype.itemsize, leading * dtype.itemsize))
