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
    """Return the loss, the number of correct rows, and what backward hands out.

    Args:
        hidden: [N, D] input of the head, one row per token or per sequence.
        weight: [V, D] the head, stored dtype.
        targets: [N] integers in [0, V), or -100 for a row that does not count.
        bias: [V] or None.
        row_weights: [N] weight of each row in the sum, or None for ones.
        normalizer: divides the sum: the counted rows of the optimizer step, or the sum of their weights.
        label_smoothing: ε in [0, 1): the share of each target that is spread evenly over all V.
        wants_gradient: False in evaluation: one product instead of two.
        wants_weight: also the gradients of weight and bias, for a head that is trained.
        chunk_bytes: upper limit of the logits that exist at once, though never less than one row.

    Raises:
        ShapeError: the arrays do not fit.
        DataError: a target is outside [0, V), or the normalizer is not positive.
        UsageError: the label smoothing is outside [0, 1).
    """
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
