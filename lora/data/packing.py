"""Rows of uneven length into micro-batches of a fixed budget of tokens, without padding and with few gaps.

Contract: contracts/training/packing.yaml. Source: best-fit decreasing, Johnson 1973, "Near-optimal bin
packing algorithms", section 2.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from lora.data.packed import Packed


def best_fit_decreasing(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Return the rows of each bin, ascending; the bin with the most tokens comes first.

    The longest rows are placed first, each into the bin that it leaves the least room in. No two bins would
    fit into one.

    Args:
        lengths: the tokens of each row, [S] integers of 1 or more.
        max_tokens: of a bin; a row that is longer has a bin of its own.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that are free, bin), ascending
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(rooms, (length, 0))
        if at == len(rooms):
            bins.append([])
            room, chosen = max(max_tokens, length), len(bins) - 1
        else:
            room, chosen = rooms.pop(at)
        bins[chosen].append(row)
        insort(rooms, (room - length, chosen))
    rows = [np.sort(np.array(members, np.int64)) for members in bins]
    return sorted(rows, key=lambda members: -int(np.sum(lengths[members])))


def micro_batches(batches: Sequence[Packed], max_tokens: int, *, packing: bool = True) -> list[Packed]:
    """Return the rows of all `batches` in parts that are run one after the other.

    Args:
        batches: of one optimizer step.
        max_tokens: of a part; a row that is longer runs alone.
        packing: False to run every row alone.
    """
    joined = _join(batches)
    if not packing:
        return [_take(joined, np.array([row])) for row in range(joined.num_sequences)]
    return [_take(joined, rows) for rows in best_fit_decreasing(joined.lengths, max_tokens)]


def longest_first(
    steps: Sequence[Sequence[np.ndarray]], lengths: np.ndarray, max_tokens: int
) -> list[Sequence[np.ndarray]]:
    """Return the steps of an epoch with the one that takes the most memory moved to the front.

    That is the step with the largest micro-batch, and of these the one with the most tokens: a run that does
    not fit fails at its first step. The other steps keep their order, so that the order of an epoch belongs
    to its seed and its rows alone.

    Args:
        steps: for each optimizer step its batches of row indices.
        lengths: the tokens of every row.
        max_tokens: of a micro-batch.
    """

    def weight(step: Sequence[np.ndarray]) -> tuple[int, int]:
        tokens = lengths[np.concatenate(step)]
        largest = best_fit_decreasing(tokens, max_tokens)[0]
        return int(tokens[largest].sum()), int(tokens.sum())

    heaviest = max(range(len(steps)), key=lambda index: weight(steps[index]))
    return [steps[heaviest], *steps[:heaviest], *steps[heaviest + 1 :]]


def _join(batches: Sequence[Packed]) -> Packed:
    lengths = np.concatenate([batch.lengths for batch in batches])
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return Packed(
        np.concatenate([batch.input_ids for batch in batches]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate(targets) if targets else None,
    )


def _take(packed: Packed, rows: np.ndarray) -> Packed:
    """Return the sequences `rows` of `packed`, in this order."""
    starts, lengths = packed.cu_seqlens[rows], packed.lengths[rows]
    tokens = np.concatenate(
        [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    )
    targets = packed.targets
    if targets is not None:
        # one for each sequence, or for each token; where every sequence is one token long, both are the same
        targets = targets[rows if len(targets) == packed.num_sequences else tokens]
    return Packed(packed.input_ids[tokens], np.concatenate([[0], np.cumsum(lengths)]), targets)
