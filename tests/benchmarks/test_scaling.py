"""`python -m benchmarks scaling`: exponents of measurements that are made up, and one point that is real."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.__main__ import main
from benchmarks.results import read
from benchmarks.scaling import AXES, Point, flops, growth_exponent, judge, planned_bytes, size_on

SIZES = [2, 4, 8, 16]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_constant_does_not_hide_what_grows(exponent: float) -> None:
    assert growth_exponent(SIZES, [1000 + 3 * size**exponent for size in SIZES]) == pytest.approx(exponent)


def test_what_does_not_grow_has_no_exponent() -> None:
    assert growth_exponent(SIZES, [5.0, 5.0, 5.0, 5.0]) is None
    assert growth_exponent(SIZES, [5.0, 4.0, 6.0, 5.0]) is None


def test_a_term_that_grows_faster_than_the_arithmetic_is_flagged() -> None:
    linear, squared = [10 + size for size in SIZES], [10 + size**2 for size in SIZES]
    assert not judge(SIZES, linear, linear, 0.3)["too_fast"]
    assert not judge(SIZES, linear, squared, 0.3)["too_fast"]
    assert judge(SIZES, squared, linear, 0.3)["too_fast"]


@pytest.mark.parametrize("axis", AXES)
def test_sizes_double_along_every_axis(axis: str) -> None:
    sizes = [size_on(axis, point) for point in AXES[axis]]
    assert all(after == 2 * before for before, after in pairwise(sizes))


def test_the_arithmetic_is_linear_but_for_the_length() -> None:
    exponents = {
        axis: growth_exponent([size_on(axis, point) for point in points], list(map(flops, points)))
        for axis, points in AXES.items()
    }
    assert 1 < exponents.pop("length") < 2
    assert exponents == {axis: pytest.approx(1) for axis in exponents}


def test_the_plan_grows_with_tokens() -> None:
    assert planned_bytes(Point(rows=8)) > planned_bytes(Point(rows=4))


def test_one_point_is_measured_in_a_process_of_its_own() -> None:
    found = scaling.measure_once(Point(rows=1, tokens=8, layers=1, rank=2, vocabulary=512))
    assert found["bytes"] > 0
    assert found["seconds"] > 0
    assert found["foreign_share"] is None or 0 <= found["foreign_share"] <= 1


def attempts(monkeypatch: pytest.MonkeyPatch, *made_up: tuple[float, float | None]) -> list[dict[str, Any]]:
    """Let measurements be these (seconds, foreign share); return the list that they are added to."""
    found: list[dict[str, Any]] = []

    def once(point: Point) -> dict[str, Any]:
        seconds, foreign = made_up[len(found) % len(made_up)]
        found.append({"seconds": seconds, "bytes": 1000 + point.layers, "foreign_share": foreign})
        return found[-1]

    monkeypatch.setattr(scaling, "measure_once", once)
    return found


@pytest.mark.parametrize("foreign", [0.01, None])
def test_a_disturbed_point_is_measured_again(foreign: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attempts(monkeypatch, (9.0, 0.5), (1.0, foreign), (0.5, 0.0))
    assert scaling.measure(Point())["seconds"] == 1.0
    assert len(found) == 2


def test_the_fastest_of_disturbed_attempts_is_kept_with_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    found = attempts(monkeypatch, (9.0, 0.5), (4.0, 0.1), (5.0, 0.3))
    assert scaling.measure(Point()) == {"seconds": 4.0, "bytes": 1004, "foreign_share": 0.1}
    assert len(found) == scaling.ATTEMPTS


def test_a_disturbed_first_point_is_not_taken_for_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # linear but for the first point, which was disturbed: the steps up are 1, 4 and 8, exponent 1.5
    made_up = {2: (5.0, 0.4), 4: (6.0, 0.0), 8: (10.0, 0.0), 16: (18.0, 0.0)}

    def once(point: Point) -> dict[str, Any]:
        seconds, foreign = made_up[point.layers]
        return {"seconds": seconds, "bytes": 1000 + point.layers, "foreign_share": foreign}

    monkeypatch.setattr(scaling, "measure_once", once)
    assert main(["scaling", "--axes", "layers", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "layers: DISTURBED, seconds not judged: other work took 40 % of the processor" in shown
    assert "TOO FAST" not in shown
    (record,) = read(tmp_path / "scaling.jsonl")
    assert record["disturbed"]
    assert record["seconds"]["exponent"] > record["seconds"]["allowed"]
    assert record["too_fast"] == []


@pytest.mark.parametrize(("power", "code"), [(1, 0), (2, 1)])
def test_the_command_flags_what_grows_too_fast(
    power: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(point: Point) -> dict[str, Any]:
        return {"seconds": 1 + point.layers**power, "bytes": 1000 + point.layers, "foreign_share": 0.0}

    monkeypatch.setattr(scaling, "measure", measure)
    assert main(["scaling", "--axes", "layers", "--output", str(tmp_path)]) == code
    shown = capsys.readouterr().out
    assert ("layers: seconds grow with exponent 2.00, allowed 1.30: TOO FAST" in shown) == bool(code)
    (record,) = read(tmp_path / "scaling.jsonl")
    assert record["sizes"] == [2, 4, 8, 16]
    assert record["seconds"]["arithmetic"] == pytest.approx(1)
    assert record["too_fast"] == (["seconds"] if code else [])
