"""The geometry of a report's charts: where lines, dots and ticks stand. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36  # around the plot, in pixels
MOST_POINTS = 600  # of one line; more are averaged in groups
TICKS = 5


@dataclass(frozen=True)
class Series:
    """Values over steps or epochs."""

    name: str
    style: str  # a class of the page's style sheet
    xs: Sequence[float]
    ys: Sequence[float]
    dots: bool = False  # marks each value


@dataclass(frozen=True)
class Tick:
    """A value written at an axis."""

    at: float  # pixels
    label: str


@dataclass(frozen=True)
class Dot:
    """A marked value; its text shows under the pointer."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series as an SVG path."""

    name: str
    style: str
    path: str
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines in one plot area of `width` by `height` pixels."""

    title: str
    x_label: str
    width: int
    height: int
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def left(self) -> int:
        """Where the plot begins."""
        return LEFT

    @property
    def right(self) -> int:
        """Where the plot ends."""
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        """Where the horizontal axis stands."""
        return self.height - BOTTOM


def line_chart(
    title: str, x_label: str, series: Sequence[Series], *, width: int, height: int, zero: bool = False
) -> Chart:
    """Return the chart of `series`, each of one value or more; `zero` begins the vertical axis at 0.

    Its text is as large as the page's where it is drawn `width` pixels wide.
    """
    xs = [x for one in series for x in one.xs]
    ys = [y for one in series for y in one.ys]
    x_scale = _Scale(min(xs), max(xs), LEFT, width - RIGHT)
    marks = _nice_ticks(min(0, *ys) if zero else min(ys), max(ys))
    y_scale = _Scale(marks[0], marks[-1], height - BOTTOM, TOP)
    x_marks = [mark for mark in _nice_ticks(min(xs), max(xs), whole=True) if min(xs) <= mark <= max(xs)]
    return Chart(
        title,
        x_label,
        width,
        height,
        tuple(_line(one, x_scale, y_scale) for one in series),
        tuple(Tick(x_scale(mark), f"{mark:,.0f}") for mark in x_marks),
        tuple(Tick(y_scale(mark), _label(mark, marks[1] - marks[0])) for mark in marks),
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential mean over about a twentieth of the values, without the pull of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[float]:
    """Return at most `most` means of equal groups of neighbours; few values as they are."""
    group = math.ceil(len(values) / most)
    groups = (values[first : first + group] for first in range(0, len(values), group))
    return [sum(part) / len(part) for part in groups]


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def _line(series: Series, x_scale: _Scale, y_scale: _Scale) -> Line:
    places = [(x_scale(x), y_scale(y)) for x, y in zip(thinned(series.xs), thinned(series.ys), strict=True)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    dots = [
        Dot(x_scale(x), y_scale(y), f"{series.name}, {x:g}: {y:.4g}")
        for x, y in zip(series.xs, series.ys, strict=True)
        if series.dots
    ]
    return Line(series.name, series.style, path, tuple(dots))


def _nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return about five round numbers from the last one below `low` to the first one above `high`."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / TICKS))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span <= TICKS * unit * factor * 1.0001)
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [index * step for index in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    if step < 1e-4:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"
