"""The room under test, and copies of it in which a contract was edited: the planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from lora import contracts, spec
from lora.contracts import FamilyContract
from lora.errors import ContractError
from lora.spec import layouts, read, sizes, tensors

NAMES = (
    "canonical_name",
    "check_named_size",
    "is_skipped",
    "layout_of",
    "parameter_count",
    "read_spec",
    "size_names",
    "size_spec",
    "stored_name",
    "tensor_shapes",
)
ROOM = SimpleNamespace(**{name: getattr(spec, name) for name in NAMES})


def refusal(read: Callable[..., Any], *args: Any) -> str:
    """Return the message with which `read` refuses `args`; accepting them fails the check."""
    try:
        read(*args)
    except ContractError as error:
        return str(error)
    raise AssertionError(f"accepted: {args}")


def changed(**functions: Callable[..., Any]) -> SimpleNamespace:
    """Return the room with some of its functions replaced."""
    room = SimpleNamespace(**{**vars(ROOM), **functions})
    if "tensor_shapes" in functions:
        room.parameter_count = lambda s: sum(prod(shape) for shape in room.tensor_shapes(s).values())
    return room


def edited(contract: FamilyContract, **fields: Any) -> SimpleNamespace:
    """Return the room as it would be with these fields of `contract` replaced."""
    bad = replace(contract, **fields)

    def family_contract(name: str) -> FamilyContract:
        return bad if name == contract.contract else contracts.family_contract(name)

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        bare = getattr(function, "__wrapped__", function)  # past the cache, which holds the right answer

        def run(*args: Any) -> Any:
            with ExitStack() as stack:
                for module in (read, sizes, tensors, layouts):
                    stack.enter_context(patch.object(module, "family_contract", family_contract))
                stack.enter_context(patch.object(layouts, "_prefixes", layouts._prefixes.__wrapped__))
                return bare(*args)

        return run

    return SimpleNamespace(**{name: under(function) for name, function in vars(ROOM).items()})


def with_tensors(
    contract: FamilyContract, group: str, changes: dict[str, Any], **fields: Any
) -> SimpleNamespace:
    """Return the room with tensors of `group` changed, or left out where the change is None."""
    found = {k: v for k, v in {**contract.tensors[group], **changes}.items() if v is not None}
    return edited(contract, tensors={**contract.tensors, group: found}, **fields)


def with_sizes(
    contract: FamilyContract, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> SimpleNamespace:
    """Return the room with the config of every size passed through `change`."""
    found = {k: replace(size, config=change(dict(size.config))) for k, size in contract.sizes.items()}
    return edited(contract, sizes=found)
