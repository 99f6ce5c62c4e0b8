"""What the tests say of themselves: which claims they try to falsify, and which bugs they plant."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

TESTS = Path(__file__).parent.parent


class Attempt(NamedTuple):
    """One mark `claim(id)`, and where it stands."""

    claim: str
    test: str
    campaign: bool  # runs by name only


@cache
def test_modules() -> tuple[ModuleType, ...]:
    """Return every module of tests, imported as pytest imports it."""
    names = (
        ".".join(("tests", *path.relative_to(TESTS).with_suffix("").parts))
        for path in TESTS.rglob("test_*.py")
    )
    return tuple(map(import_module, sorted(names)))


@cache
def attempts() -> tuple[Attempt, ...]:
    """Return every claim that a test, or a parameter of one, is marked with."""
    return tuple(
        Attempt(mark.args[0], test, any(m.name == "campaign" for m in marks))
        for test, marks in _marked_tests()
        for mark in marks
        if mark.name == "claim"
    )


@cache
def parameter_ids() -> frozenset[str]:
    """Return the ids of all parameters that have one."""
    return frozenset(str(parameter.id) for _, _, parameter in _parameters() if parameter.id is not None)


def _marked_tests() -> Iterator[tuple[str, list[Any]]]:
    for name, function in _functions():
        yield name, _marks(function)
    for name, function, parameter in _parameters():
        yield name, [*_marks(function), *parameter.marks]


def _functions() -> Iterator[tuple[str, Any]]:
    for module in test_modules():
        for name, value in vars(module).items():
            if name.startswith("test") and inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value


def _parameters() -> Iterator[tuple[str, Any, Any]]:
    """Yield (test, function, pytest.param) for every parameter that was written as a `pytest.param`."""
    for name, function in _functions():
        for mark in _marks(function):
            if mark.name == "parametrize":
                yield from ((name, function, p) for p in mark.args[1] if hasattr(p, "marks"))


def _marks(function: Any) -> list[Any]:
    return list(getattr(function, "pytestmark", []))
