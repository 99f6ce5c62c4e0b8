"""One step over all adapters at once, clipped together: rank 16 on all linears of Qwen2.5-0.5B and 7B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal

SETTINGS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
CLIP = 1.0


class Shape(NamedTuple):
    """How many arrays, their rank, their width: an A and a B for each of seven linears of every block."""

    L: int
    R: int
    D: int


SHAPES = (Shape(2 * 7 * 24, 16, 896), Shape(2 * 7 * 28, 16, 3584))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`. The moments are those of a run under way."""
    exact = {name: normal(rng, *shape) for name in ("parameters", "gradients", "m")}
    return Inputs({}, {**exact, "v": np.square(normal(rng, *shape))})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`. Moves the parameters at every call; those of the first are compared."""
    parameters, gradients = list(a["parameters"]), list(a["gradients"])
    moments = list(zip(a["m"], a["v"], strict=True))

    def step() -> dict[str, Any]:
        norm = operation.step(parameters, gradients, moments, step=10, clip=CLIP, **SETTINGS)
        return {"norm": np.array(norm), **{name: a[name] for name in ("parameters", "m", "v")}}

    return {"step": step}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: four arrays in, three out, and the gradients once more before, for their norm."""
    elements = shape.L * shape.R * shape.D
    return {"step": Work(8 * 4 * elements, 16 * elements)}
