"""Every instance of every kernel, compiled for every architecture that is shipped for: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import lora.cuda
from lora.backend import Kernel, nvrtc

ARCHITECTURES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # and the shared memory that a block can have
TOGETHER = 8  # instances of one file in one compilation: they share the reading of its headers

_SECTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)


class Build(NamedTuple):
    """What one kernel became."""

    usage: nvrtc.Usage
    instructions: frozenset[str]  # names of the machine instructions, without their modifiers
    warnings: tuple[str, ...]  # of the compilation that the kernel was part of


@cache
def modules() -> tuple[str, ...]:
    """Return the names of the modules of lora.cuda that launch kernels."""
    return tuple(sorted(path.stem for path in Path(lora.cuda.__path__[0]).glob("[!_]*.py")))


@cache
def kernels() -> tuple[Kernel, ...]:
    """Return what the modules say that they launch, each instance once, ordered by file and name."""
    listed = {kernel for name in modules() for kernel in import_module(f"lora.cuda.{name}").KERNELS}
    return tuple(sorted(listed))


def build(kernel: Kernel, arch: str) -> Build:
    """Return what `kernel` became for `arch`; the first of a file waits for all of that file."""
    return _builds(kernel.file)[kernel.name, arch]


@cache
def _builds(file: str) -> dict[tuple[str, str], Build]:
    """Compile what is launched of `file`, on two cores, and return the builds by name and architecture."""
    names = sorted({kernel.name for kernel in kernels() if kernel.file == file})
    portions = [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]
    jobs = [(file, portion, arch) for portion in portions for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:  # threads: NVRTC lets go of Python's lock
        return {
            key: build for made in pool.map(lambda job: _compile(*job), jobs) for key, build in made.items()
        }


def _compile(file: str, names: Sequence[str], arch: str) -> dict[tuple[str, str], Build]:
    compiled = nvrtc.compile_cubin(file, names, arch)
    usage, code = nvrtc.usage(compiled.log), instructions(compiled.cubin)
    warnings = tuple(line for line in compiled.log.splitlines() if "warning" in line.lower())
    symbols = compiled.lowered.items()
    return {(name, arch): Build(usage[symbol], code[symbol], warnings) for name, symbol in symbols}


def instructions(cubin: bytes) -> dict[str, frozenset[str]]:
    """Return the machine instructions of every kernel in `cubin`, by symbol, as nvdisasm reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_nvdisasm(), "-c", file.name], check=True, capture_output=True, text=True
        ).stdout
    _, *parts = _SECTION.split(text)
    return {
        symbol: frozenset(_OPCODE.findall(code)) for symbol, code in zip(parts[::2], parts[1::2], strict=True)
    }


@cache
def _nvdisasm() -> str:
    import nvidia

    places = [place for root in nvidia.__path__ for place in Path(root).glob("*/bin/nvdisasm")]
    assert places, "nvdisasm is not installed: pip install -e '.[test]'"
    return str(places[0])
