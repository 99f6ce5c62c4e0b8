"""Frozen linears with corrections of rank 16: q, k and v, gate and up, down, of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal

SCALE = 2.0


class Shape(NamedTuple):
    """Rows, width of the input, widths of the outputs of up to three parts (0: there is none), rank."""

    N: int
    I: int  # noqa: E741 - the axis of what enters a linear
    O1: int
    O2: int
    O3: int
    R: int

    def outputs(self) -> list[int]:
        """Return the widths of the parts that there are."""
        return [width for width in (self.O1, self.O2, self.O3) if width]


SHAPES = (
    Shape(8192, 896, 896, 128, 128, 16),
    Shape(8192, 896, 4864, 4864, 0, 16),
    Shape(8192, 4864, 896, 0, 0, 16),
    Shape(4096, 3584, 3584, 512, 512, 16),
    Shape(4096, 3584, 18944, 18944, 0, 16),
    Shape(4096, 18944, 3584, 0, 0, 16),
)


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`. Adapters are float32, as in training; each correction is as large as its product."""
    stored, exact = {"x": normal(rng, shape.N, shape.I)}, {}
    for part, width in enumerate(shape.outputs()):
        stored[f"weight{part}"] = normal(rng, width, shape.I) * np.float32(shape.I**-0.5)
        stored[f"bias{part}"] = normal(rng, width)
        stored[f"dy{part}"] = normal(rng, shape.N, width)
        exact[f"a{part}"] = normal(rng, shape.R, shape.I) * np.float32(shape.I**-0.5)
        exact[f"b{part}"] = normal(rng, width, shape.R) * np.float32(shape.R**-0.5)
    return Inputs(stored, exact)


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""
    parts = tuple(
        operation.Part(a[f"weight{n}"], a[f"bias{n}"], operation.Factors(a[f"a{n}"], a[f"b{n}"], SCALE))
        for n in range(count(a))
    )
    dys = tuple(a[f"dy{n}"] for n in range(count(a)))

    def forward() -> dict[str, Any]:
        return {f"y{n}": y for n, y in enumerate(operation.forward(a["x"], parts)[0])}

    def backward() -> dict[str, Any]:
        grads = operation.backward(saved, dys)
        factors = {f"d{name}{n}": getattr(g, name) for n, g in enumerate(grads.parts) for name in "ab"}
        return {"dx": grads.x, **factors}

    _, saved = operation.forward(a["x"], parts)
    return {"forward": forward, "backward": backward}


def count(a: Mapping[str, Any]) -> int:
    """Return how many parts the arrays are of."""
    return sum(name.startswith("weight") for name in a)


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: the base products, and of each correction two products forward and four backward."""
    parts, width, rows = len(shape.outputs()), sum(shape.outputs()), shape.N
    base, factors = shape.I * width, shape.R * (parts * shape.I + width)
    size = 2 * (rows * (shape.I + width) + base + width) + 4 * factors
    return {
        "forward": Work(size, 2 * rows * (base + factors)),
        "backward": Work(size + 2 * rows * shape.I + 4 * factors, 2 * rows * (base + 2 * factors)),
    }
