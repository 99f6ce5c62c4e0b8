"""What the claims of an operation are tried on: reference, host, and CUDA kernels, emulated or on a GPU.

    IMPLEMENTATIONS = implementations(rmsnorm)

    @pytest.mark.parametrize(("check", "op"), tried(CHECKS, IMPLEMENTATIONS))
    @given(case=CASES, schedule=schedules)
    def test_claim(check, op, case, schedule):
        check(op.on(schedule), case)

A check calls `op.forward` and `op.backward` with NumPy arrays and gets NumPy arrays, whatever runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pytest

from lora.backend import to_host
from lora.backend.device import cupy_module
from lora.backend.kernel import using_engine
from lora.host import row_blocks
from tests.emulator import requires_emulator
from tests.emulator.engine import Edit, Emulator
from tests.harness.claims import Check, claim

_Check = TypeVar("_Check", bound=Check)


def in_float64(check: _Check) -> _Check:
    """Mark a check that needs float64, which kernels do not have: it is tried on the reference alone."""
    check.needs_float64 = True  # type: ignore[attr-defined]
    return check


class Reference:
    """The module of `lora.ops` itself."""

    float64 = True
    marks: tuple[Any, ...] = ()

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __str__(self) -> str:
        return "reference"

    def on(self, schedule: int) -> Any:
        """Return the module; it knows no schedule."""
        return self._module


class Host(Reference):
    """A module of `lora.host`, in blocks so small that a case has several of them."""

    def __str__(self) -> str:
        return "host"

    def on(self, schedule: int) -> Any:
        """Return the module's functions; threads share out the blocks as they come."""

        def in_small_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with patch.multiple(row_blocks, BLOCK_ELEMENTS=64, WHOLE_ELEMENTS=32):
                    return function(*args, **kwargs)

            return run

        public = [name for name in ("angles", "forward", "backward") if hasattr(self._module, name)]
        return SimpleNamespace(**{name: in_small_blocks(getattr(self._module, name)) for name in public})


class Emulated:
    """The launchers of `lora.cuda` over the emulator, with the sources as they are or with planted bugs."""

    float64 = False
    marks = (requires_emulator,)

    def __init__(self, module: ModuleType, *edits: Edit) -> None:
        self._module, self._edits = module, edits
        Emulator(
            edits=edits
        )  # refuses an edit whose text is not there, before a test could take that for a kill

    def __str__(self) -> str:
        return "emulator"

    def on(self, schedule: int) -> Any:
        """Return the module's functions as they run when warps and lanes are ordered by `schedule`.

        `emulator` beside them is what they ran on.
        """
        emulator = Emulator(schedule, edits=self._edits)

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with using_engine(emulator):
                return function(*args, **kwargs)

        functions = _with_arrays_of(self._module, run, lambda array: array)
        functions.emulator = emulator
        return functions


class OnDevice:
    """The launchers of `lora.cuda` on a GPU."""

    float64 = False
    marks = (pytest.mark.gpu,)

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __str__(self) -> str:
        return "gpu"

    def on(self, schedule: int) -> Any:
        """Return the module's functions on the device, which has a schedule of its own."""
        pairs: list[tuple[np.ndarray, Any]] = []

        def moved(array: np.ndarray) -> Any:
            pairs.append((array, cupy_module().asarray(array)))
            return pairs[-1][1]

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            # what it wrote into an argument is seen there, as on the host
            for array, copy in pairs:
                array[...] = to_host(copy)
            pairs.clear()
            return result

        return _with_arrays_of(self._module, run, moved)


def implementations(reference: ModuleType) -> list[Any]:
    """Return everything that implements the operation `reference`, a module of `lora.ops`."""
    stem, found = reference.__name__.rpartition(".")[2], [Reference(reference)]
    if find_spec(f"lora.host.{stem}"):
        found.append(Host(import_module(f"lora.host.{stem}")))
    if find_spec(f"lora.cuda.{stem}"):
        kernels = import_module(f"lora.cuda.{stem}")
        found += [Emulated(kernels), OnDevice(kernels)]
    return found


def tried(checks: Mapping[str, Check], on: Sequence[Any]) -> list[Any]:
    """Return the parameters (check, implementation), each marked with its claim."""
    return [
        pytest.param(check, op, id=f"{claim_id}-{op}", marks=(claim(claim_id), *op.marks))
        for claim_id, check in checks.items()
        for op in on
        if op.float64 or not hasattr(check, "needs_float64")
    ]


def _with_arrays_of(module: ModuleType, run: Callable[..., Any], moved: Callable[[Any], Any]) -> Any:
    """Return the public functions of `module`; they take and give NumPy arrays, and `moved` ones inside."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = [_each_array(moved, argument) for argument in args]
            result = run(function, *inside, **{k: _each_array(moved, v) for k, v in kwargs.items()})
            # the record for backward stays where it was made; what has no backward has none
            if function.__name__ == "forward" and isinstance(result, tuple):
                return _each_array(to_host, result[0]), result[1]
            return _each_array(to_host, result)

        return call

    public = inspect.getmembers(module, lambda value: inspect.isfunction(value))
    return SimpleNamespace(**{name: wrapped(value) for name, value in public if not name.startswith("_")})


def _each_array(change: Callable[[Any], Any], value: Any) -> Any:
    """Return `value`, an array or a tuple with arrays in it, with `change` made to each of them."""
    if isinstance(value, tuple):
        parts = [_each_array(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    is_array = isinstance(value, np.ndarray) or type(value).__module__.startswith("cupy")
    return change(value) if is_array else value
