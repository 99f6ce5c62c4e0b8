"""The order in which an epoch visits the rows."""

from __future__ import annotations

import numpy as np

from lora.backend import named_stream


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the row indices of each batch, [batch_size] int64 each; the last may be shorter.

    Every row comes once. The order belongs to (seed, epoch) alone, so a run that resumes in the middle of an
    epoch finds the batches it had.
    """
    order = named_stream(seed, "epoch", epoch).permutation(n)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]
