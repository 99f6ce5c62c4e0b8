"""What generation keeps of the tokens it has seen: keys and values, or a state and a convolution's window."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from lora.backend import Array, array_module, beside
from lora.dispatch import Ops


@dataclass
class Cache:
    """The memory of S sequences, block by block: filled by a prompt, then grown a token at a time."""

    capacity: int  # tokens that a sequence may grow to
    lengths: Array  # [S] tokens seen by every block, on the host
    new: Array = field(init=False)  # [S+1] boundaries of the tokens that the blocks see now, on the host
    seen: Array = field(init=False)  # [S] tokens of each sequence with these, beside the weights
    keys: dict[str, Array] = field(default_factory=dict)  # block -> [S, capacity, G, E]
    values: dict[str, Array] = field(default_factory=dict)
    windows: dict[str, Array] = field(default_factory=dict)
    states: dict[str, Array] = field(default_factory=dict)

    def expect(self, cu_seqlens: Array, weight: Array) -> None:
        """Say which tokens come next, before the first block sees them: `cu_seqlens` [S+1], on the host."""
        self.new = cu_seqlens
        self.seen = beside(self.lengths + np.diff(cu_seqlens), weight)

    def attend(
        self, ops: Ops, block: str, q: Array, k: Array, v: Array, cu_seqlens: Array, *, scale: float
    ) -> Array:
        """Keep the new keys and values, and return o [N, H, E] of the new queries over all that is kept."""
        self._keep(block, k, v)
        if not self.lengths.any():
            return ops.attention.forward(q, k, v, cu_seqlens, scale=scale)[0]
        return ops.cached_attention.forward(q, self.keys[block], self.values[block], self.seen, scale=scale)

    def memory(self, block: str) -> tuple[Array | None, Array | None]:
        """Return a gated-delta block's (conv window, state), None before the prompt."""
        return self.windows.get(block), self.states.get(block)

    def remember(self, block: str, window: Array, state: Array) -> None:
        """Keep a gated-delta block's window and state."""
        self.windows[block], self.states[block] = window, state

    def advance(self) -> None:
        """Count the tokens that every block has now seen."""
        self.lengths = self.lengths + np.diff(self.new)

    def keep_rows(self, rows: list[int]) -> None:
        """Forget every sequence but those of the indices `rows`."""
        self.lengths = self.lengths[rows]
        for kept in (self.keys, self.values, self.windows, self.states):
            for block, array in kept.items():
                kept[block] = array[beside(np.array(rows), array)]

    def _keep(self, block: str, k: Array, v: Array) -> None:
        if block not in self.keys:
            shape = (len(self.lengths), self.capacity, *k.shape[1:])
            self.keys[block], self.values[block] = (array_module(k).zeros(shape, k.dtype) for _ in range(2))
        for row, (start, stop) in enumerate(pairwise(self.new)):
            places = slice(self.lengths[row], self.lengths[row] + stop - start)
            self.keys[block][row, places] = k[start:stop]
            self.values[block][row, places] = v[start:stop]
