"""Head, loss and gradient in one, with the vocabularies of Qwen2.5-0.5B and 7B; the head is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Rows, width, vocabulary."""

    N: int
    D: int
    V: int


SHAPES = (Shape(4096, 896, 151936), Shape(16384, 896, 151936), Shape(4096, 3584, 152064))


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`. Logits spread as far as a trained model's: with flat ones every probability is zero."""
    weight = normal(rng, shape.V, shape.D)
    weight *= 3 / shape.D**0.5
    targets = rng.integers(0, shape.V, shape.N)
    return Inputs({"hidden": normal(rng, shape.N, shape.D), "weight": weight}, {"targets": targets})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def loss_and_gradient() -> dict[str, Any]:
        outcome, saved = operation.forward(
            a["hidden"], a["weight"], a["targets"], normalizer=len(a["targets"])
        )
        return {"loss": np.array(outcome.loss), "dhidden": operation.backward(saved).hidden}

    return {"loss and gradient": loss_and_gradient}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: two products with the head; no logit has to leave the chip."""
    size = 2 * (2 * shape.V * shape.D + 2 * shape.N * shape.D) + 8 * shape.N
    return {"loss and gradient": Work(size, 4 * shape.N * shape.D * shape.V + 6 * shape.N * shape.V)}
