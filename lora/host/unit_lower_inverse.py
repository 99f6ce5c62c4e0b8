"""The inverse of many small unit lower triangular matrices at once."""

from __future__ import annotations

import numpy as np

from lora.backend import Array


def unit_lower_inverse(minus: Array) -> Array:
    """Return (I + L)⁻¹ for -L [.., C, C], which is 0 on the diagonal and above.

    Inverses of blocks on the diagonal, in pairs, are joined to those of blocks twice as large:

        [A 0; B D]⁻¹ = [A⁻¹ 0; -D⁻¹ B A⁻¹ D⁻¹]

    No power of L occurs: those of 64 rows of ones reach 10^18 before they cancel.
    """
    *stack, size, _ = minus.shape
    padded = 1 << (size - 1).bit_length()
    inverse, filled = np.zeros((2, *stack, padded, padded), minus.dtype)
    filled[..., :size, :size] = minus
    _diagonal_blocks(inverse, 1)[...] = 1
    half = 1
    while half < padded:
        blocks, of_minus = _diagonal_blocks(inverse, 2 * half), _diagonal_blocks(filled, 2 * half)
        below = np.matmul(of_minus[..., half:, :half], blocks[..., :half, :half])
        np.matmul(blocks[..., half:, half:], below, out=blocks[..., half:, :half])
        half *= 2
    return inverse[..., :size, :size]


def _diagonal_blocks(square: Array, size: int) -> Array:
    """Return a view [.., blocks, size, size] of the blocks on the diagonal of a contiguous [.., C, C]."""
    *stack, count, _ = square.shape
    *outer, row, column = square.strides
    shape, strides = (*stack, count // size, size, size), (*outer, size * (row + column), row, column)
    return np.ndarray(shape, square.dtype, square, strides=strides)
