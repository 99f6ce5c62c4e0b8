"""What an operator, a filter or a method of Jinja makes beyond what it reads, charged before it is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

from lora.data.template_budget import ITEM, Budget

MAX_BITS = 1024  # of a product or power of whole numbers
MAX_WIDTH = 10_000  # a number that a filter pads or cuts by

REFUSED_METHODS = frozenset(("encode", "translate", "to_bytes"))
# a width of four digits or more, or one that comes with the arguments
_WIDE_PRINTF = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d{4}|\d*\.(\*|\d{4}))")
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^}]*(\{|\d{4})")

Growth = Callable[[Budget, Any, Sequence[Any]], None]  # (budget, value, arguments)


def spend_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge what `left operator right` makes.

    Raises:
        SecurityError: it makes a number of more than 1,024 bits, or pads by a number of four digits.
    """
    if operator == "%" and isinstance(left, str):
        _printf(budget, left, right)
    elif operator == "*":
        _product(budget, left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)


def spend_filter(budget: Budget, name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Charge what the filter `name` makes.

    Raises:
        SecurityError: it is given a number, or a kind of value, that a chat template has no use for.
    """
    if name in _FILTERS:
        _FILTERS[name](budget, value, arguments)


def spend_method(budget: Budget, owner: Any, name: str, arguments: Sequence[Any]) -> None:
    """Charge what the method `name` of `owner` reads and makes.

    Raises:
        SecurityError: it is none that a chat template has use for.
    """
    if name in REFUSED_METHODS or (isinstance(owner, str) and not hasattr(str, name)):
        raise SecurityError(f"the method {name!r} is none that a chat template may call")
    if not isinstance(owner, dict):
        budget.read(owner)
    if isinstance(owner, str) and name in _METHODS:
        _METHODS[name](budget, owner, arguments)


def _product(budget: Budget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | list | tuple) and isinstance(times, int):
            budget.spend(max(0, times) * len(repeated) * (1 if isinstance(repeated, str) else ITEM))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"expected numbers of at most {MAX_BITS} bits, found one of {bits}")


def _printf(budget: Budget, text: str, values: Any) -> None:
    if _WIDE_PRINTF.search(text):
        raise SecurityError("expected widths of at most three digits in a format")
    # a named value may be written many times
    for _ in range(1 + text.count("%(")):
        budget.read(values)


def _format_filter(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    _printf(budget, str(value), arguments)


def _format_method(budget: Budget, text: str, arguments: Sequence[Any]) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("expected widths of at most three digits in a format")
    for _ in range(text.count("{")):
        budget.read(*arguments)


def _widths(arguments: Sequence[Any]) -> int:
    """Return the sum of the numbers among `arguments`."""
    numbers = [abs(number) for number in arguments if isinstance(number, int)]
    if any(number > MAX_WIDTH for number in numbers):
        raise SecurityError(f"expected a width of at most {MAX_WIDTH:,}, found {max(numbers)}")
    return sum(numbers)


def _pad(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    budget.spend(_widths(arguments))


def _expand_tabs(budget: Budget, text: str, arguments: Sequence[Any]) -> None:
    budget.spend(_widths(arguments) * text.count("\t"))


def _indent(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    width = _widths(arguments) + sum(len(text) for text in arguments if isinstance(text, str))
    budget.spend(width * (1 + len(str(value).splitlines())))


def _replace(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    texts = [str(text) for text in arguments[:2]]
    if len(texts) == 2:
        budget.spend((1 + str(value).count(texts[0])) * len(texts[1]))


def _join_filter(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    budget.spend(len(value) * sum(len(text) for text in arguments if isinstance(text, str)))


def _join_method(budget: Budget, text: str, arguments: Sequence[Any]) -> None:
    budget.spend(len(text) * sum(map(len, arguments)))


def _sum(budget: Budget, value: Any, arguments: Sequence[Any]) -> None:
    # lists would be copied once for each that is added
    if not all(isinstance(argument, int | float | str | None) for argument in arguments):
        raise SecurityError("sum: expected to start from a number")


_FILTERS: dict[str, Growth] = {
    "batch": _pad,
    "center": _pad,
    "format": _format_filter,
    "indent": _indent,
    "join": _join_filter,
    "replace": _replace,
    "round": _pad,
    "slice": _pad,
    "sum": _sum,
}
_METHODS: dict[str, Growth] = {
    "center": _pad,
    "expandtabs": _expand_tabs,
    "format": _format_method,
    "format_map": _format_method,
    "join": _join_method,
    "ljust": _pad,
    "replace": _replace,
    "rjust": _pad,
    "zfill": _pad,
}
