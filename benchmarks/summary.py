"""Samples into one figure and its spread; measurements into the exponent that they grow with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Fit(NamedTuple):
    """y = factor · x^exponent, by least squares on the logarithms."""

    exponent: float
    factor: float
    worst: float  # largest |log(y / fitted)|: 0.1 is a measurement 10 % off the line


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the samples lie, linear between neighbours.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("expected at least one sample, found none")
    ordered, place = sorted(samples), share * (len(samples) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(samples: Sequence[float]) -> float:
    """Return the middle sample."""
    return quantile(samples, 0.5)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Return median, 10th and 90th percentile, and the samples themselves."""
    return {
        "median": median(samples),
        "p10": quantile(samples, 0.1),
        "p90": quantile(samples, 0.9),
        "samples": list(samples),
    }


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios of samples that were taken one after the other.

    A machine that slows down for a while slows both of a pair, so their ratio keeps what their medians lose.
    """
    return median([a / b for a, b in zip(over, under, strict=True)])


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Return the power law nearest to the points.

    Raises:
        ValueError: fewer than two different x, or a value that is not positive.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"expected two or more different x, and positive values; found x {x}, y {y}")
    u, v = [math.log(value) for value in x], [math.log(value) for value in y]
    centre_u, centre_v = sum(u) / len(u), sum(v) / len(v)
    exponent = sum((a - centre_u) * (b - centre_v) for a, b in zip(u, v, strict=True)) / sum(
        (a - centre_u) ** 2 for a in u
    )
    offset = centre_v - exponent * centre_u
    worst = max(abs(b - offset - exponent * a) for a, b in zip(u, v, strict=True))
    return Fit(exponent, math.exp(offset), worst)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return (slope, offset) of the straight line nearest to the points."""
    centre_x, centre_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - centre_x) ** 2 for a in x
    )
    return slope, centre_y - slope * centre_x
