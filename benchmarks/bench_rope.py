"""Rotary embedding of queries and keys, with the heads of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal

THETA = 1e6


class Shape(NamedTuple):
    """Tokens, query heads, key heads, width of a head; all of it is rotated."""

    N: int
    H: int
    G: int
    E: int


SHAPES = (Shape(4096, 14, 2, 64), Shape(16384, 14, 2, 64), Shape(4096, 28, 4, 128), Shape(16384, 28, 4, 128))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    heads = {"q": shape.H, "k": shape.G, "dq": shape.H, "dk": shape.G}
    angle = np.arange(shape.N)[:, None] * THETA ** (-np.arange(0, shape.E, 2) / shape.E)
    angles = {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    return Inputs({name: normal(rng, shape.N, count, shape.E) for name, count in heads.items()}, angles)


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> Any:
        return operation.forward(a["q"], a["k"], a["cos"], a["sin"])

    def backward() -> dict[str, Any]:
        grads = operation.backward(saved, a["dq"], a["dk"])
        return {"dq": grads.q, "dk": grads.k}

    _, saved = forward()
    return {"forward": lambda: dict(zip(("q", "k"), forward()[0], strict=True)), "backward": backward}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: queries and keys in and out, the angles in."""
    elements = shape.N * (shape.H + shape.G) * shape.E
    each = Work(2 * 2 * elements + 4 * shape.N * shape.E, 3 * elements)
    return {"forward": each, "backward": each}
