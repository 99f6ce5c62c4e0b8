"""A pool of its own, out of which NumPy's count of memory sees every array."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lora.backend import memory


@contextmanager
def counted_memory() -> Iterator[None]:
    """Let no array be cut from memory that is there already, nor from addresses that are no memory yet."""
    with patch.multiple(memory, _pool=memory.Pool(), SLAB_BYTES=0):
        yield
