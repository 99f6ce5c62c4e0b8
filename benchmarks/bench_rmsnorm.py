"""RMSNorm with the residual add before it, at the widths of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal

EPS = 1e-6


class Shape(NamedTuple):
    """Rows and their width."""

    N: int
    D: int


SHAPES = (Shape(4096, 896), Shape(16384, 896), Shape(4096, 3584), Shape(16384, 3584))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    rows = {name: normal(rng, shape.N, shape.D) for name in ("x", "residual", "dy", "dstream")}
    return Inputs({**rows, "weight": normal(rng, shape.D)}, {})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> Any:
        return operation.forward(a["x"], a["weight"], a["residual"], eps=EPS)

    _, saved = forward()
    return {
        "forward": lambda: dict(zip(("y", "stream"), forward()[0], strict=True)),
        "backward": lambda: {"dx": operation.backward(saved, a["dy"], a["dstream"]).x},
    }


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: four arrays each; x, residual, y, stream forward, stream, dy, dstream, dx backward."""
    elements = shape.N * shape.D
    size = 4 * 2 * elements + 4 * shape.N + 2 * shape.D
    return {"forward": Work(size, 6 * elements), "backward": Work(size, 9 * elements)}
