"""The rows that every contestant trains on: random ids, drawn once and written to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases import CLASSES, Lengths, Task


@dataclass(frozen=True)
class Batch:
    """Rows of uneven length and, for a classifier, the class of each."""

    rows: list[list[int]]
    labels: list[int] | None

    @property
    def tokens(self) -> int:
        """Real ones: padding is none."""
        return sum(map(len, self.rows))

    @property
    def padded_tokens(self) -> int:
        """What a library computes that pads every row to the longest."""
        return len(self.rows) * max(map(len, self.rows))

    def as_json(self) -> dict[str, Any]:
        """Return what a worker reads."""
        return {"rows": self.rows, "labels": self.labels}


def draw(lengths: Lengths, task: Task, ids: int, rounds: int, seed: int) -> list[Batch]:
    """Return the batches of `rounds` rounds. Each round has the same lengths and ids of its own.

    Rows of one seed are in random order, as a data loader gives them: no sorting by length.
    """
    rng = np.random.default_rng(seed)
    sizes = [row_lengths(lengths, rng) for _ in range(lengths.batches)]
    return [_batch(size, task, ids, rng) for _ in range(rounds) for size in sizes]


def row_lengths(lengths: Lengths, rng: np.random.Generator) -> list[int]:
    """Return the tokens of each row of one batch."""
    if lengths.sigma is None:
        return [lengths.tokens] * lengths.rows
    drawn = rng.lognormal(np.log(lengths.tokens), lengths.sigma, lengths.rows)
    return np.clip(np.rint(drawn), 2, lengths.longest).astype(int).tolist()


def padding_share(batches: list[Batch]) -> float:
    """Return the share of the padded tokens that are no tokens of a row."""
    return 1 - sum(batch.tokens for batch in batches) / sum(batch.padded_tokens for batch in batches)


def _batch(sizes: list[int], task: Task, ids: int, rng: np.random.Generator) -> Batch:
    rows = [rng.integers(0, ids, size).tolist() for size in sizes]
    return Batch(rows, rng.integers(0, CLASSES, len(rows)).tolist() if task == "classify" else None)
