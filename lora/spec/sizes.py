"""Published sizes by name: what `--model-size 0.5B` means."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from itertools import takewhile
from typing import Any

from lora.contracts import Size, family_contract, family_names
from lora.errors import ContractError, UsageError
from lora.spec.model_spec import ModelSpec
from lora.spec.read import read_spec

# what the base, Instruct and Coder releases of one size differ in
_RELEASE_FIELDS = (
    "max_position_embeddings",
    "rms_norm_eps",
    "eos_token_ids",
    "pad_token_id",
    "initializer_range",
)


@cache
def size_names() -> dict[str, tuple[str, str]]:
    """Return (family, size) by every lower-case name of a size: the size itself and its aliases."""
    return {
        name: (family, size)
        for family in family_names()
        for size, entry in family_contract(family).sizes.items()
        for name in (size, *entry.aliases)
    }


@cache
def size_spec(name: str) -> ModelSpec:
    """Return the sizes that `name` (in any case) stands for.

    Raises:
        UsageError: no contract knows the name.
    """
    family, _, entry = _entry(name)
    return read_spec({"model_type": family_contract(family).model_types[0], **entry.config})


def size_hub(name: str) -> str:
    """Return the id of the hub checkpoint that `name` stands for.

    Raises:
        UsageError: no contract knows the name.
    """
    return _entry(name)[2].hub


def check_named_size(spec: ModelSpec, name: str) -> None:
    """Compare a checkpoint's sizes with those of the size that the user named.

    Raises:
        UsageError: no contract knows the name.
        ContractError: they differ; the message names every field that does.
    """
    family, size, _ = _entry(name)
    named = size_spec(name)
    compared = [field.name for field in fields(ModelSpec) if field.name not in _RELEASE_FIELDS]
    differing = [
        _difference(key, getattr(spec, key), getattr(named, key))
        for key in compared
        if getattr(spec, key) != getattr(named, key)
    ]
    if differing:
        raise ContractError(
            f"the checkpoint is not {family} {size}, the size that was named: {'; '.join(differing)}; "
            "name the right size, or none to take the checkpoint's own"
        )


def _difference(key: str, found: Any, expected: Any) -> str:
    if not isinstance(found, tuple):
        return f"{key} is {found}, expected {expected}"
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=False)))
    return f"{key} has {len(found)} entries, expected {len(expected)}, and differs from entry {same} on"


def _entry(name: str) -> tuple[str, str, Size]:
    if name.lower() not in size_names():
        known = ", ".join(size for family in family_names() for size in family_contract(family).sizes)
        raise UsageError(f"unknown model size {name!r}; known sizes: {known}")
    family, size = size_names()[name.lower()]
    return family, size, family_contract(family).sizes[size]
