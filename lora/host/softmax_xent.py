"""The head and its loss, the softmax of rows shared out over threads; defined in lora/ops/softmax_xent.py."""

from __future__ import annotations

from functools import partial

import numpy as np

from lora.backend import Array, run_all
from lora.host.row_blocks import row_blocks
from lora.ops.softmax_xent import CHUNK_BYTES, Outcome, Saved, Softmax, backward, forward_by, softmax_rows

__all__ = ["backward", "forward"]


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
    """Return the loss, the number of correct rows, and what backward hands out; arguments as there."""
    return forward_by(
        _in_blocks,
        hidden,
        weight,
        targets,
        bias,
        row_weights,
        normalizer=normalizer,
        label_smoothing=label_smoothing,
        wants_gradient=wants_gradient,
        wants_weight=wants_weight,
        chunk_bytes=chunk_bytes,
    )


def _in_blocks(logits: Array, targets: Array, smoothing: float, *, wants_gradient: bool) -> Softmax:
    rows = len(logits)
    found = Softmax(np.empty(rows, logits.dtype), np.empty(rows, np.int64), np.empty(rows, logits.dtype))

    def run(block: slice) -> None:
        part = softmax_rows(logits[block], targets[block], smoothing, wants_gradient=wants_gradient)
        for whole, share in zip(found, part, strict=True):
            whole[block] = share

    run_all([partial(run, block) for block in row_blocks(logits)])
    return found
