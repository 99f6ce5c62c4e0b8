"""Samples into figures, and measurements into exponents."""

from __future__ import annotations

import math

import pytest

from benchmarks.summary import fit_power, median, paired_ratio, quantile, spread
from benchmarks.table import figure, table


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([10.0, 20.0], 0.1) == pytest.approx(11)
    assert median([7.0]) == 7.0
    assert spread([1.0, 2.0, 3.0]) == {
        "median": 2.0,
        "p10": pytest.approx(1.2),
        "p90": pytest.approx(2.8),
        "samples": [1.0, 2.0, 3.0],
    }


def test_no_sample_has_no_median() -> None:
    with pytest.raises(ValueError, match="found none"):
        median([])


def test_a_pair_keeps_its_ratio_when_the_machine_slows_down() -> None:
    # both took ten times as long in one turn; medians of each side alone would say 2.2
    theirs, ours = [2.0, 22.0, 2.2], [1.0, 10.0, 1.0]
    assert paired_ratio(theirs, ours) == pytest.approx(2.2)
    with pytest.raises(ValueError, match="argument"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, -0.5])
def test_a_power_law_is_found_exactly(exponent: float) -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    fit = fit_power(x, [3 * value**exponent for value in x])
    assert fit.exponent == pytest.approx(exponent)
    assert fit.factor == pytest.approx(3)
    assert fit.worst == pytest.approx(0, abs=1e-12)


def test_a_point_off_the_line_is_seen() -> None:
    fit = fit_power([1, 2, 4, 8], [1, 2, 4 * math.e, 8])
    assert fit.worst > 0.5


@pytest.mark.parametrize(("x", "y"), [([2, 2], [1, 2]), ([1, 2], [0, 1]), ([-1, 2], [1, 1])])
def test_no_power_law_through_less_than_two_points_or_zero(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match="positive values"):
        fit_power(x, y)


def test_a_table_aligns_texts_left_and_numbers_right() -> None:
    assert table(("name", "s"), [("a", "10"), ("longer", "2")]).splitlines() == [
        "name     s",
        "------  --",
        "a       10",
        "longer   2",
    ]


def test_figures_keep_three_digits() -> None:
    assert [figure(value) for value in (None, 0.0, 0.01234, 1.5, 123.4, 98765.0)] == [
        "-",
        "0",
        "0.0123",
        "1.5",
        "123",
        "98,765",
    ]
