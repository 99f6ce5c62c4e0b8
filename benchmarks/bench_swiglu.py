"""The gated activation, at the feed-forward widths of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Rows and their width."""

    N: int
    F: int


SHAPES = (Shape(4096, 4864), Shape(16384, 4864), Shape(4096, 18944))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    return Inputs({name: normal(rng, *shape) for name in ("gate", "up", "dy")}, {})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def backward() -> dict[str, Any]:
        grads = operation.backward(saved, a["dy"])
        return {"dgate": grads.gate, "dup": grads.up}

    _, saved = operation.forward(a["gate"], a["up"])
    return {"forward": lambda: {"y": operation.forward(a["gate"], a["up"])[0]}, "backward": backward}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: three arrays forward, five backward."""
    elements = shape.N * shape.F
    return {
        "forward": Work(3 * 2 * elements, 5 * elements),
        "backward": Work(5 * 2 * elements, 11 * elements),
    }
