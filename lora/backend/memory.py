"""The one door for memory that an operation writes into: outputs and scratch."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora.backend.arrays import Array, array_module


def empty(shape: tuple[int, ...], dtype: Any, like: Array = None) -> Array:
    """Return an uninitialised C-contiguous array in the library of `like` (NumPy without one)."""
    return allocate(shape, dtype, like)


def allocate(shape: tuple[int, ...], dtype: Any, like: Array = None) -> Array:
    """Allocate without a pool. Apart from `empty`, so that tests can hand out poisoned memory instead."""
    return (np if like is None else array_module(like)).empty(shape, dtype)
