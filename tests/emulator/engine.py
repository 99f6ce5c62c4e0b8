"""An engine for `lora.backend.kernel.using_engine`: kernels run on the host, which shows what a GPU hides.

Every array is copied for the launch against a page that nobody may touch, so that an access out of bounds is
an error and not somebody else's memory; what the kernel only reads cannot be written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from lora.assets import asset
from lora.backend.kernel import Kernel
from lora.backend.signature import read_signature
from tests.emulator.build import edited, library, symbol
from tests.emulator.guarded import Guarded, OutOfBoundsError
from tests.emulator.pages import stacks

Edit = tuple[str, str, str]  # file, old text, new text


_one_at_a_time = Lock()  # the stacks and the handler of faults are the process's


class EmulatorError(Exception):
    """A kernel did what no GPU must be asked to do: the message says what, in which block and thread."""


class BankConflicts(NamedTuple):
    """What ldmatrix did in all launches so far."""

    reads: int  # 8 x 8 matrices
    extra_passes: int  # over shared memory, beyond one for each matrix


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint64),
        ("stacks", ctypes.c_void_p),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("error", ctypes.c_char * 480),
        ("ldmatrix_reads", ctypes.c_uint64),
        ("ldmatrix_conflicts", ctypes.c_uint64),
    )


@cache
def declared_instances(kernel: Kernel) -> tuple[str, ...]:
    """Return every instance of the kernel's file that its launchers have: they are built together.

    "attention_backward.cu" belongs to lora.cuda.attention: the stem of an operation, and what it is split in.
    """
    words = Path(kernel.file).stem.split("_")
    modules = (f"lora.cuda.{'_'.join(words[:count])}" for count in range(len(words), 0, -1))
    module = next(filter(find_spec, modules), None)
    declared = import_module(module).KERNELS if module else ()
    return tuple(sorted({kernel.name, *(other.name for other in declared if other.file == kernel.file)}))


def launched_instance(kernel: Kernel) -> tuple[str, ...]:
    """Return the kernel alone: what is launched once, as a changed source is, builds faster so."""
    return (kernel.name,)


class Emulator:
    """Runs kernels whose arguments are NumPy arrays.

    Args:
        seed: of the order in which blocks, warps and lanes run, and of the side on which arrays touch
            forbidden memory; 0 is the natural order.
        edits: changes of the sources, for planted bugs.
        kernels: the folder of the sources; the project's own without it.
        instances: which instances of a kernel's file are built with it.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        edits: Sequence[Edit] = (),
        kernels: Path | None = None,
        instances: Callable[[Kernel], tuple[str, ...]] = declared_instances,
    ) -> None:
        folder = asset("kernels") if kernels is None else kernels
        self._kernels = edited(folder, tuple(edits)) if edits else folder
        self._instances = launched_instance if edits else instances
        self._seed = seed
        self._reads = self._conflicts = 0

    @property
    def bank_conflicts(self) -> BankConflicts:
        return BankConflicts(self._reads, self._conflicts)

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Run `kernel` over `grid` blocks, one thread after another.

        Raises:
            EmulatorError: an access out of bounds or misaligned, a deadlock, a barrier that threads reach at
                different places, a collective with a wrong mask.
            ValueError: two arrays overlap without being the same, and one of them is written.
            BuildError: the source does not compile, or there is no compiler.
        """
        built = library(self._kernels / kernel.file, self._instances(kernel))
        run = getattr(built, symbol(kernel.name))
        written = [parameter.written for parameter in read_signature(kernel.file, kernel.name)]
        launch = _Launch(grid, kernel.threads, kernel.shared_bytes, self._seed, stacks())
        report = _Report()
        try:
            with _one_at_a_time, Guarded(values, written, at_end=self._seed % 2 == 0) as boxes:
                addresses = (ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes))
                if run(ctypes.byref(launch), addresses, len(boxes), ctypes.byref(report)):
                    raise EmulatorError(f"{kernel.name}: {report.error.decode()}")
        except OutOfBoundsError as error:
            raise EmulatorError(f"{kernel.name}: {error}") from error
        self._reads += report.ldmatrix_reads
        self._conflicts += report.ldmatrix_conflicts
