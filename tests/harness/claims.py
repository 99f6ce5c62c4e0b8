"""Ties tests to the claims of contracts, and proves that a test can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lora.contracts import Contract
from tests.emulator.build import BuildError

BROKEN = (TypeError, NameError, AttributeError, BuildError)  # what a mutant raises that was written wrongly
Check = Callable[[Any, Any], None]  # (the implementation under test, one drawn case)
schedules = st.integers(0, 2**32 - 1)  # in which order the threads of a kernel run, where it is emulated


def claim(claim_id: str) -> pytest.MarkDecorator:
    """Mark a test as an attempt to falsify the claim `claim_id` of a contract."""
    return pytest.mark.claim(claim_id)


def claimed(checks: Mapping[str, Check]) -> list[Any]:
    """Return the parameters (claim id, check), each marked with its claim."""
    return [pytest.param(check, id=claim_id, marks=claim(claim_id)) for claim_id, check in checks.items()]


def planted(contract: Contract, checks: Mapping[str, Check], mutants: Mapping[str, Any]) -> list[Any]:
    """Return the parameters (check, mutant) of every planted bug that `contract` says a claim kills.

    A bug without a mutant, or a mutant that no claim names, is an error.
    """
    named = {bug for c in contract.claims for bug in c.kills}
    if named != mutants.keys():
        raise ValueError(f"{contract.contract}: kills and mutants differ: {sorted(named ^ mutants.keys())}")
    return [
        pytest.param(checks[c.id], mutants[bug], id=f"{c.id}-{bug}", marks=getattr(mutants[bug], "marks", ()))
        for c in contract.claims
        for bug in c.kills
    ]


def assert_killed(check: Check, mutant: Any, cases: SearchStrategy[Any]) -> None:
    """Fail unless some case drawn from `cases` makes `check` reject `mutant`.

    A mutant of a kernel has `on`, which gives its functions under a schedule.
    A mutant that cannot even be called is no bug that anybody would make: it fails the test instead.
    """

    @settings(
        max_examples=200,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(cases if not hasattr(mutant, "on") else st.tuples(cases, schedules))
    def survives(drawn: Any) -> None:
        op, case = (mutant.on(drawn[1]), drawn[0]) if hasattr(mutant, "on") else (mutant, drawn)
        with np.errstate(all="ignore"):
            check(op, case)

    try:
        survives()
    except BROKEN:
        raise
    except (Exception, pytest.fail.Exception):  # noqa: BLE001 - any rejection kills it, that of pytest.raises too
        return
    pytest.fail("the planted bug survived: this claim's test cannot see it")
