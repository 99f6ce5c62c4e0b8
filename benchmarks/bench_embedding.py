"""Rows of the embedding table of Qwen2.5-0.5B by random ids; backward, as full fine-tuning asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Tokens, rows of the table, width."""

    N: int
    V: int
    D: int


SHAPES = (Shape(4096, 151936, 896), Shape(16384, 151936, 896))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    stored = {"table": normal(rng, shape.V, shape.D), "dx": normal(rng, shape.N, shape.D)}
    return Inputs(stored, {"ids": rng.integers(0, shape.V, shape.N)})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> Any:
        return operation.forward(a["ids"], a["table"], dtype=a["table"].dtype)

    _, saved = forward()
    return {
        "forward": lambda: {"x": forward()[0]},
        "backward": lambda: {"dtable": operation.backward(saved, a["dx"]).table},
    }


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: the rows in and out; the gradients in, and the whole table's out in float32."""
    rows, ids = 2 * shape.N * shape.D, 8 * shape.N
    return {
        "forward": Work(2 * rows + ids, 0),
        "backward": Work(rows + ids + 4 * shape.V * shape.D, shape.N * shape.D),
    }
