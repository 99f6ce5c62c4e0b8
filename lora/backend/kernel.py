"""Launching a kernel: the arguments are checked against its CUDA source, then an engine runs it.

CUDA itself checks nothing: an argument of the wrong width is read as garbage, and a view with strides as if
it had none. CuPy arrays go to the device; NumPy arrays go to the engine of `using_engine`, which executes the
same source on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora.backend.arrays import Array, array_module
from lora.backend.signature import Parameter, read_signature
from lora.errors import DeviceError, KernelError

_REAL = (float, int, np.floating, np.integer)
_NUMBERS = {
    "b": (bool, np.bool_),
    "i": (int, np.integer),
    "u": (int, np.integer),
}  # by kind of dtype; else _REAL

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, compute capability 5.0 and above


class Kernel(NamedTuple):
    """One instance of a kernel, and how a block of it is launched."""

    file: str  # under the kernels folder: "rmsnorm.cu"
    name: str  # the instance as C++ spells it: "rmsnorm_forward<__nv_bfloat16>"
    threads: int  # of one block
    shared_bytes: int = 0  # dynamic shared memory of one block


class Engine(Protocol):
    """What runs a kernel whose arguments are already checked."""

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Run `kernel` over `grid` blocks.

        `values` are C-contiguous arrays, and NumPy scalars of exactly the width that the source declares; a
        null pointer is `numpy.uintp(0)`.
        """
        ...


_host_engine: ContextVar[Engine | None] = ContextVar("host_engine", default=None)


@contextmanager
def using_engine(engine: Engine) -> Iterator[None]:
    """Run kernels whose arguments are NumPy arrays on `engine`, in this thread, until the block ends."""
    token = _host_engine.set(engine)
    try:
        yield
    finally:
        _host_engine.reset(token)


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: Array | float | None) -> None:
    """Run `kernel` over `grid` blocks, of one to three dimensions.

    Args:
        kernel: the instance.
        grid: blocks along x, y and z, each at least 1.
        arguments: arrays, numbers and None (a null pointer), in the order of the kernel's parameters.

    Raises:
        KernelError: an argument is not what the source declares; nothing was run.
        DeviceError: the arrays are of two libraries, or no engine runs kernels on arrays of theirs.
    """
    parameters = read_signature(kernel.file, kernel.name)
    if len(arguments) != len(parameters):
        raise KernelError(f"{kernel.name}: expected {len(parameters)} arguments, got {len(arguments)}")
    values = [_checked(kernel, *pair) for pair in zip(parameters, arguments, strict=True)]
    _engine(kernel, values).launch(kernel, _three(kernel, grid), values)


def _engine(kernel: Kernel, values: Sequence[Any]) -> Engine:
    """Return what runs `kernel` on arrays of the library that `values` hold."""
    module = array_module(*(value for value in values if not isinstance(value, np.generic)))
    if module is not np:
        from lora.backend.device import DeviceEngine  # what it needs is loaded where there is a device

        return DeviceEngine()
    engine = _host_engine.get()
    if engine is None:
        raise DeviceError(f"{kernel.name} is a CUDA kernel: expected CuPy arrays, got NumPy arrays")
    return engine


def _three(kernel: Kernel, grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1, 1)[:3]
    within = all(1 <= n <= limit for n, limit in zip((x, y, z), GRID_LIMITS, strict=True))
    if not 1 <= len(grid) <= 3 or not within:
        raise KernelError(
            f"{kernel.name}: expected a grid of 1 to 3 dimensions within {GRID_LIMITS}, got {grid}"
        )
    return x, y, z


def _checked(kernel: Kernel, parameter: Parameter, argument: Any) -> Any:
    """Return what the engine passes for `argument`."""
    check = _pointer if parameter.pointer else _scalar
    value, problem = check(parameter, argument)
    if problem:
        raise KernelError(f"{kernel.name}, parameter {parameter.name}: {problem}")
    return value


def _pointer(parameter: Parameter, argument: Any) -> tuple[Any, str | None]:
    if argument is None:
        return np.uintp(0), None
    if not hasattr(argument, "dtype") or isinstance(argument, np.generic):
        return None, f"expected an array of {parameter.dtype}, got {argument!r}"
    if argument.dtype != parameter.dtype:
        return None, f"expected an array of {parameter.dtype}, got {argument.dtype}"
    if not argument.flags.c_contiguous:
        return (
            None,
            f"expected a C-contiguous array, got shape {argument.shape} with strides {argument.strides}",
        )
    if parameter.written and isinstance(argument, np.ndarray) and not argument.flags.writeable:
        return None, "is written by the kernel, and the array is read-only"
    return argument, None


def _scalar(parameter: Parameter, argument: Any) -> tuple[Any, str | None]:
    dtype = parameter.dtype
    is_bool = isinstance(argument, bool | np.bool_)
    if is_bool != (dtype.kind == "b") or not isinstance(argument, _NUMBERS.get(dtype.kind, _REAL)):
        return None, f"expected a number of {dtype}, got {argument!r}"
    if dtype.kind in "biu":
        fits = dtype.kind == "b" or np.iinfo(dtype).min <= argument <= np.iinfo(dtype).max
        return (dtype.type(argument), None) if fits else (None, f"{argument} does not fit {dtype}")
    with np.errstate(over="ignore"):
        value = dtype.type(argument)
    if np.isfinite(argument) and not np.isfinite(value):
        return None, f"{argument} does not fit {dtype}"
    return value, None
