"""Packed sequences cut into chunks of equal size, in an order in which whole batches of them move together.

All first chunks come first, then all second ones, and so on; among those of one time the longest sequences
lead, so that the sequences that go on are always a prefix. Places behind a sequence's last token hold zeros.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lora.backend import Array, array_module, to_host


class Step(NamedTuple):
    """Chunks that are computed at once: the n-th ones of neighbouring sequences."""

    chunks: slice
    sequences: slice  # in the layout's order
    first: bool  # no chunk comes before these
    last: bool  # none of their sequences goes on


class Layout(NamedTuple):
    """Where each token is, and in which steps the chunks are taken."""

    size: int  # C, tokens of a chunk
    slots: Array  # [N] the place of each token among the places of all chunks
    order: Array  # [S] the sequences, longest first
    steps: tuple[Step, ...]  # in order of time

    @property
    def places(self) -> int:
        """All places of all chunks."""
        return self.steps[-1].chunks.stop * self.size

    def spread(self, x: Array) -> Array:
        """Return `x` [N, ...] at its places [places, ...], zeros elsewhere."""
        flat = array_module(x).zeros((self.places, *x.shape[1:]), x.dtype)
        flat[self.slots] = x
        return flat

    def in_chunks(self, flat: Array) -> Array:
        """Return [places, G, M, width] as a view [chunks, G, M, C, width]."""
        return flat.reshape(-1, self.size, *flat.shape[1:]).transpose(0, 2, 3, 1, 4)


def chunk_layout(cu_seqlens: Array, *, largest: int, tokens_at_once: int) -> Layout:
    """Return the layout of the sequences bounded by `cu_seqlens` [S+1].

    A chunk has at most `largest` tokens, and no more than the longest sequence. A step takes as many chunks
    as hold `tokens_at_once`, at least one.
    """
    xp, bounds = array_module(cu_seqlens), to_host(cu_seqlens)
    lengths = bounds[1:] - bounds[:-1]
    size = int(min(largest, lengths.max()))
    order, chunks = np.argsort(-lengths, kind="stable"), -(-lengths // size)
    going = [int((chunks > n).sum()) for n in range(chunks.max() + 1)]  # sequences with an n-th chunk
    ends = np.cumsum([0, *going])
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    offset = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    slots = (ends[offset // size] + np.repeat(rank, lengths)) * size + offset % size
    steps = []
    for time, (count, later) in enumerate(pairwise(going)):
        for start in range(0, count, max(1, tokens_at_once // size)):
            stop = min(start + max(1, tokens_at_once // size), count)
            chunks_at = slice(int(ends[time]) + start, int(ends[time]) + stop)
            steps.append(Step(chunks_at, slice(start, stop), time == 0, start >= later))
    return Layout(size, xp.asarray(slots), xp.asarray(order), tuple(steps))
