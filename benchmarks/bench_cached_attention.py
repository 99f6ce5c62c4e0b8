"""One step of generation: a query a sequence over a full cache; heads of Qwen2.5-0.5B, 7B and Qwen3.5-4B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Sequences, tokens that each has kept, query heads, key-value heads, width of a head."""

    S: int
    C: int
    H: int
    G: int
    E: int


SHAPES = (
    Shape(1, 16384, 14, 2, 64),
    Shape(32, 4096, 14, 2, 64),
    Shape(32, 4096, 28, 4, 128),
    Shape(32, 4096, 16, 4, 256),
)


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    cache = {name: normal(rng, shape.S, shape.C, shape.G, shape.E) for name in ("keys", "values")}
    stored = {"q": normal(rng, shape.S, shape.H, shape.E), **cache}
    return Inputs(stored, {"lengths": np.full(shape.S, shape.C)})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> dict[str, Any]:
        scale = a["q"].shape[2] ** -0.5
        return {"o": operation.forward(a["q"], a["keys"], a["values"], a["lengths"], scale=scale)}

    return {"forward": forward}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: every kept key and value once, and two products with them."""
    queries, kept = shape.S * shape.H * shape.E, shape.S * shape.C * shape.G * shape.E
    return {"forward": Work(2 * (2 * queries + 2 * kept), 4 * shape.C * queries)}
