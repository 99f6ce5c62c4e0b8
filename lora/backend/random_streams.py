"""Random streams by name: adding one consumer never moves the numbers that another one draws."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def named_stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the generator (Philox) that belongs to `seed` and to `names`, and to nothing else."""
    keys = [name if isinstance(name, int) else crc32(name.encode()) for name in names]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *keys])))
