"""Attempts to falsify contracts/training/schedule.yaml."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.train.schedule import warmup_cosine
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("schedule")
FLOOR = 1e-6


class Case(NamedTuple):
    total: int
    warmup: float
    peak: float

    @property
    def rising(self) -> int:
        return math.ceil(self.warmup * self.total)

    def rates(self, schedule: Any) -> list[float]:
        return [schedule(step, self.total, peak=self.peak, warmup=self.warmup) for step in range(self.total)]


def check_warmup(schedule: Any, case: Case) -> None:
    rates = case.rates(schedule)[: case.rising]
    assert rates == pytest.approx([case.peak * (i + 1) / case.rising for i in range(case.rising)], rel=1e-12)


def check_cosine(schedule: Any, case: Case) -> None:
    rates, floor = case.rates(schedule)[case.rising :], min(FLOOR, case.peak)
    last = len(rates) - 1
    exact = [
        floor + (case.peak - floor) * math.cos(math.pi / 2 * i / max(1, last)) ** 2 for i in range(len(rates))
    ]
    assert rates == pytest.approx(exact, rel=1e-9, abs=1e-15)
    assert last < 1 or rates[-1] == pytest.approx(floor, rel=1e-9)


def check_range(schedule: Any, case: Case) -> None:
    assert all(0 < rate <= case.peak * (1 + 1e-12) for rate in case.rates(schedule))


CHECKS = {"SCHEDULE-001": check_warmup, "SCHEDULE-002": check_cosine, "SCHEDULE-003": check_range}
CASES = st.builds(
    Case,
    st.integers(*CONTRACT.domain["total_steps"]),
    st.floats(0, 0.99),
    st.sampled_from([1e-7, 2e-4, 1e-2, 1.0]),
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(warmup_cosine, case)


def starts_at_zero(step: int, total: int, *, peak: float, warmup: float) -> float:
    rising = math.ceil(warmup * total)
    return peak * step / rising if step < rising else warmup_cosine(step, total, peak=peak, warmup=warmup)


def falls_linearly(step: int, total: int, *, peak: float, warmup: float) -> float:
    rising, floor = math.ceil(warmup * total), min(FLOOR, peak)
    if step < rising:
        return warmup_cosine(step, total, peak=peak, warmup=warmup)
    return peak - (peak - floor) * (step - rising) / max(1, total - 1 - rising)


MUTANTS = {
    "starts_at_zero": starts_at_zero,
    "warms_up_one_step_less": lambda step, *a, **k: warmup_cosine(step + 1, *a, **k),
    "jumps_to_the_peak": lambda step, total, *, peak, warmup: warmup_cosine(step, total, peak=peak, warmup=0),
    "falls_linearly": falls_linearly,
    "ends_at_zero": lambda *a, **k: warmup_cosine(*a, **k) - FLOOR,
    "stops_half_way": lambda step, total, **k: warmup_cosine(step, 2 * total, **k),
    "overshoots": lambda *a, **k: 1.01 * warmup_cosine(*a, **k),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
