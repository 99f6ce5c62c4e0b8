"""The steps that one rendering of a chat template may take.

A step is about a character, an eighth of an item of a list, or a node of the template that runs. The same
template on the same messages takes the same steps on every machine: no clock is read.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

STEPS = 5 * 10**7  # of one rendering
OPERATION = 30  # steps of a call, a filter or an operator
ITEM = 8  # steps of an item of a list
BUDGET = "the budget of this rendering"  # a template's variable that no template can spell

_COLLECTIONS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class BudgetError(TemplateRuntimeError):
    """A rendering has no steps left."""


class Budget:
    """The steps that one rendering has left."""

    def __init__(self) -> None:
        self._left = STEPS

    def spend(self, steps: int) -> None:
        """Take `steps`.

        Raises:
            BudgetError: there are not so many.
        """
        self._left -= steps
        if self._left < 0:
            raise BudgetError(f"it takes more than {STEPS:,} steps on one row")

    def read(self, *values: Any) -> None:
        """Take the steps of reading `values` to their last character, shared parts each time they occur."""
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.spend(ITEM + len(value))
            elif isinstance(value, dict):
                self.spend(ITEM * (1 + len(value)))
                stack += [*value, *value.values()]
            elif isinstance(value, _COLLECTIONS):
                self.spend(ITEM * (1 + len(value)))
                stack += value
            elif isinstance(value, range):
                self.spend(ITEM * (1 + len(value)))
            else:
                self.spend(ITEM + (value.bit_length() if isinstance(value, int) else 0))

    def made(self, value: Any) -> Any:
        """Take the steps of having made `value` from parts that were there, and return it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(ITEM * len(value))
        return value

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield `values`, each for its steps."""
        for value in values:
            self.spend(OPERATION)
            yield value
