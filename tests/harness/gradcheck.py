"""Gradients against float64 differences along random directions, with a random cotangent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

STEP = 1e-3
TOLERANCE = (
    1e-7  # a fourth-order difference at this step leaves about 1e-12 of truncation and of cancellation
)


def assert_gradients(
    forward: Callable[..., Any],
    inputs: Mapping[str, np.ndarray],
    cotangents: tuple[np.ndarray, ...],
    grads: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Compare ⟨grad, direction⟩ with the derivative of ⟨cotangents, forward⟩, one input at a time.

    Args:
        forward: called with `inputs` by name; returns one array, or a tuple of as many as `cotangents`.
        inputs: float64 arrays that are differentiated.
        cotangents: random float64 arrays, the gradient of a loss for each output.
        grads: the gradients under test, by input name.
        rng: draws the directions.
        tolerance: relative to the size of the two sides' parts.
    """
    for name, value in inputs.items():
        assert grads[name] is not None, f"no gradient for {name}"
        assert grads[name].shape == value.shape, f"{name}: gradient {grads[name].shape}, input {value.shape}"
        direction = rng.standard_normal(value.shape)

        def along(t: float, name: str = name, direction: np.ndarray = direction) -> float:
            outputs = forward(**{**inputs, name: inputs[name] + t * direction})
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return sum(float((c * y).sum()) for c, y in zip(cotangents, outputs, strict=True))

        numeric = (8 * (along(STEP) - along(-STEP)) - (along(2 * STEP) - along(-2 * STEP))) / (12 * STEP)
        analytic = float((grads[name] * direction).sum())
        scale = float(np.abs(grads[name] * direction).sum()) + 1.0
        assert abs(numeric - analytic) <= tolerance * scale, (
            f"{name}: {analytic} against {numeric} (scale {scale})"
        )
