"""Causal attention over one sequence, heads of Qwen2.5-0.5B (64 wide), 7B (128), Qwen3.5-4B (256)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.registry import Calls, Inputs, Work, normal


class Shape(NamedTuple):
    """Tokens, query heads, key-value heads, width of a head."""

    N: int
    H: int
    G: int
    E: int


_LENGTHS, _HEADS = (4096, 8192, 16384), ((14, 2, 64), (28, 4, 128), (16, 4, 256))
SHAPES = tuple(Shape(tokens, *heads) for heads in _HEADS for tokens in _LENGTHS)


def inputs(shape: Shape, rng: np.random.Generator) -> Inputs:
    """See `Bench`."""
    heads = {"q": shape.H, "k": shape.G, "v": shape.G, "do": shape.H}
    stored = {name: normal(rng, shape.N, count, shape.E) for name, count in heads.items()}
    return Inputs(stored, {"cu_seqlens": np.array([0, shape.N])})


def calls(operation: Any, a: Mapping[str, Any]) -> Calls:
    """See `Bench`."""

    def forward() -> Any:
        return operation.forward(a["q"], a["k"], a["v"], a["cu_seqlens"], scale=a["q"].shape[2] ** -0.5)

    def backward() -> dict[str, Any]:
        grads = operation.backward(saved, a["do"])
        return {"dq": grads.q, "dk": grads.k, "dv": grads.v}

    _, saved = forward()
    return {"forward": lambda: {"o": forward()[0]}, "backward": backward}


def work(shape: Shape) -> dict[str, Work]:
    """See `Bench`: two products forward and five backward over the scores that the mask leaves."""
    products = 2 * shape.E * shape.H * shape.N * (shape.N + 1) // 2
    queries, keys = (2 * shape.N * heads * shape.E for heads in (shape.H, shape.G))
    statistics = 4 * shape.N * shape.H
    return {
        "forward": Work(2 * queries + 2 * keys + statistics, 2 * products),
        "backward": Work(4 * queries + 4 * keys + statistics, 5 * products),
    }
