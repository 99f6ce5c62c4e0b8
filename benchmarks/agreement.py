"""Two sides that are timed must first compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# largest ‖a - b‖ / ‖b‖ of a tensor. float32: products of a few thousand terms, through 24 layers and back.
# bfloat16 keeps 8 bits, so each layer adds about 2^-9 and a gradient has passed through all of them twice.
GRADIENT = {"float32": 1e-4, "bfloat16": 1e-1}
LOSS = {"float32": 1e-5, "bfloat16": 2e-2}  # relative


class Disagreement(Exception):  # noqa: N818 - it is no error of the program
    """Two sides computed different things: no time is taken."""


class Agreement(NamedTuple):
    """How far two sides are apart."""

    loss: float  # relative
    gradient: float  # of the worst tensor, norm-wise
    worst: str  # that tensor


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖actual - expected‖ / ‖expected‖, infinite where one is not finite or the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = float(np.linalg.norm(b))
    apart = float(np.linalg.norm(a - b)) / scale if scale else float("inf") if np.any(a) else 0.0
    return apart if np.isfinite(apart) else float("inf")


def compare(
    losses: tuple[float, float], ours: Mapping[str, Any], theirs: Mapping[str, Any], dtype: str
) -> Agreement:
    """Return how far the first step of two sides is apart; `dtype` is the narrower precision of the two.

    Raises:
        Disagreement: more than `GRADIENT` or `LOSS` allows, or they train different tensors.
    """
    if ours.keys() != theirs.keys():
        extra, missing = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        raise Disagreement(
            f"they train different tensors: ours alone {extra[:3]}, theirs alone {missing[:3]}"
        )
    apart = {name: difference(ours[name], theirs[name]) for name in ours}
    worst = max(apart, key=lambda name: apart[name])
    found = Agreement(abs(losses[0] - losses[1]) / abs(losses[1]), apart[worst], worst)
    if not found.loss <= LOSS[dtype]:
        raise Disagreement(
            f"loss {losses[0]:.7g} against {losses[1]:.7g}: {found.loss:.1e} apart, allowed {LOSS[dtype]:.0e}"
        )
    if not found.gradient <= GRADIENT[dtype]:
        raise Disagreement(
            f"gradient of {worst}: {found.gradient:.1e} apart, allowed {GRADIENT[dtype]:.0e} in {dtype}"
        )
    return found
