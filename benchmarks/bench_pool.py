"""The mean of every sequence, at the widths of Qwen2.5-0.5B and 7B: what a classifier's head reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Sequences, tokens of each, width."""

    S: int
    T: int
    D: int


SHAPES = (Shape(64, 256, 896), Shape(64, 256, 3584))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    stored = {"x": normal(rng, shape.S * shape.T, shape.D), "dpooled": normal(rng, shape.S, shape.D)}
    return Inputs(stored, {"cu_seqlens": np.arange(shape.S + 1) * shape.T})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> Any:
        return operation.forward(a["x"], a["cu_seqlens"], kind="mean")

    _, saved = forward()
    return {
        "forward": lambda: {"pooled": forward()[0]},
        "backward": lambda: {"dx": operation.backward(saved, a["dpooled"]).x},
    }


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: all tokens on one side, a vector for each sequence on the other."""
    elements = shape.S * shape.T * shape.D
    each = Work(2 * (elements + shape.S * shape.D), elements)
    return {"forward": each, "backward": each}
