"""Textures: the inputs that break code which random normal numbers do not."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

TEXTURES = ("normal", "zeros", "one_hot", "equal_rows", "large", "strided")
textures = st.sampled_from(TEXTURES)
seeds = st.integers(0, 2**32 - 1)


def widths(low: int, high: int) -> st.SearchStrategy[int]:
    """Return sizes of a row: small ones, multiples of 8, which kernels read 16 bytes at a time, and any."""
    small, whole = st.integers(low, min(high, 66)), st.integers(-(-low // 8), high // 8).map(lambda n: 8 * n)
    return st.one_of(small, whole, st.integers(low, high))


def textured(
    rng: np.random.Generator, shape: tuple[int, ...], texture: str, dtype: str = "float64"
) -> np.ndarray:
    """Return an array of `shape` [..., D] with `texture`; "strided" is a non-contiguous view."""
    array = rng.standard_normal(shape)
    if texture == "zeros":
        array[...] = 0
    elif texture == "one_hot":
        hot = rng.integers(0, shape[-1], shape[:-1])
        array = (np.arange(shape[-1]) == hot[..., None]).astype("float64")
    elif texture == "equal_rows":
        array[...] = array.reshape(-1, shape[-1])[:1]
    elif texture == "large":
        array *= 1e4
    elif texture == "strided":
        doubled = np.repeat(array, 2, axis=-1).astype(dtype)
        return doubled[..., ::2]
    return array.astype(dtype)
