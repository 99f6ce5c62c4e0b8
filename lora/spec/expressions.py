"""The arithmetic that a family contract may write over axis letters: `2 * H * E`, `H % G == 0`.

The text is parsed, never executed: anything that is not one of the few nodes below is refused, so that a
contract file can hold numbers and relations and nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from lora.errors import ContractError

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_RELATIONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.LtE: operator.le,
    ast.Lt: operator.lt,
}


def evaluate(expression: str | int, axes: Mapping[str, int]) -> int:
    """Return the value of `expression`, each letter standing for its size in `axes`; a relation gives a bool.

    Raises:
        ContractError: the expression holds a node that is not allowed, or a letter without a size.
    """
    return _value(_parsed(str(expression)), axes, str(expression))


def letters(expression: str | int) -> tuple[str, ...]:
    """Return the axis letters that `expression` reads, in the order of their first appearance."""
    names = [node.id for node in ast.walk(_parsed(str(expression))) if isinstance(node, ast.Name)]
    return tuple(dict.fromkeys(names))


@cache
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ContractError(f"not an expression over axes: {expression!r}") from error


def _value(node: ast.expr, axes: Mapping[str, int], whole: str) -> Any:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=letter) if letter in axes:
            return axes[letter]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, axes, whole), _value(right, axes, whole))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _RELATIONS:
            return _RELATIONS[type(op)](_value(left, axes, whole), _value(right, axes, whole))
    raise ContractError(
        f"{whole!r}: expected letters of {sorted(axes)}, whole numbers, + - * // % and one of == <= <; "
        f"found {ast.unparse(node)!r}"
    )
