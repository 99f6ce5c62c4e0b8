"""NVRTC, NVIDIA's run-time compiler, by ctypes: CUDA text to a cubin, with no driver, GPU or C compiler.

Source: NVRTC documentation, https://docs.nvidia.com/cuda/nvrtc.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lora.assets import asset
from lora.backend import toolkit
from lora.errors import DeviceError, KernelError

# no --use_fast_math: where a kernel approximates, its source says so
OPTIONS = ("--std=c++17", "--generate-line-info", "--ptxas-options=-v")

_USAGE = re.compile(
    r"Function properties for (?P<name>\S+)\n"
    r"[^\n]*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


class Compiled(NamedTuple):
    """What NVRTC made of one file."""

    cubin: bytes
    lowered: dict[str, str]  # the symbol in the cubin, by name expression
    log: str  # warnings, and the report of ptxas


class Usage(NamedTuple):
    """What one kernel takes of a multiprocessor."""

    registers: int  # of one thread
    spilled_bytes: int  # stored to or loaded from local memory for want of registers
    stack_bytes: int  # of local memory, in one thread
    shared_bytes: int  # static shared memory of one block


def compile_cubin(file: str, names: Sequence[str], arch: str) -> Compiled:
    """Compile the instances `names` of `file` in the kernels folder for `arch`, "sm_80" or the like.

    Raises:
        KernelError: the source does not compile; the message is the compiler's.
        DeviceError: NVRTC or CUDA's headers are not installed, or this NVRTC does not know `arch`.
    """
    if arch not in architectures():
        raise DeviceError(
            f"NVRTC {'.'.join(map(str, version()))} compiles for {', '.join(architectures())}, "
            f"and not for {arch}: this GPU needs another CUDA release"
        )
    program = ctypes.c_void_p()
    source = asset("kernels", file).read_bytes()
    _call("CreateProgram", ctypes.byref(program), source, file.encode(), 0, None, None)
    try:
        return _compile(program, names, [*OPTIONS, f"--gpu-architecture={arch}", *include_options()])
    finally:
        _call("DestroyProgram", ctypes.byref(program))


def _compile(program: ctypes.c_void_p, names: Sequence[str], options: list[str]) -> Compiled:
    for name in names:
        _call("AddNameExpression", program, name.encode())
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = _library().nvrtcCompileProgram(program, len(options), encoded)
    log = _read(program, "ProgramLog").rstrip(b"\0").decode()
    if status:
        raise KernelError(log or _message(status))
    return Compiled(_read(program, "CUBIN"), {name: _lowered(program, name) for name in names}, log)


def usage(log: str) -> dict[str, Usage]:
    """Return what the report of ptxas in `log` says of each kernel, by its symbol."""
    found: dict[str, Usage] = {}
    for match in _USAGE.finditer(log):
        shared = _SHARED.search(match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        found[match["name"]] = Usage(
            int(match["registers"]), spilled, int(match["stack"]), int(shared[1]) if shared else 0
        )
    return found


@cache
def version() -> tuple[int, int]:
    """Return NVRTC's version, for example (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("Version", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def architectures() -> tuple[str, ...]:
    """Return the architectures that this NVRTC compiles for: "sm_75", "sm_80" and so on."""
    count = ctypes.c_int()
    _call("GetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call("GetSupportedArchs", numbers)
    return tuple(f"sm_{number}" for number in numbers)


def include_folders() -> tuple[Path, Path]:
    """Return where an #include is looked for: the kernels folder, then CUDA's headers."""
    return asset("kernels"), toolkit.headers(version()[0])


def include_options() -> list[str]:
    """Return the options that say so to NVRTC."""
    return [f"--include-path={folder}" for folder in include_folders()]


def _lowered(program: ctypes.c_void_p, name: str) -> str:
    symbol = ctypes.c_char_p()
    _call("GetLoweredName", program, name.encode(), ctypes.byref(symbol))
    return (symbol.value or b"").decode()


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"Get{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(f"Get{what}", program, buffer)
    return buffer.raw


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_library(), f"nvrtc{function}")(*arguments)
    if status:
        raise KernelError(f"nvrtc{function}: {_message(status)}")


def _message(status: int) -> str:
    describe = _library().nvrtcGetErrorString
    describe.restype = ctypes.c_char_p
    return describe(status).decode()


@cache
def _library() -> ctypes.CDLL:
    path = toolkit.library("nvrtc")
    # NVRTC opens its builtins by bare name, which finds them only where they are loaded already
    for builtins in sorted(path.parent.glob(f"libnvrtc-builtins.so.{path.suffix[1:]}.*")):
        toolkit.load(builtins, ctypes.RTLD_GLOBAL)
    return toolkit.load(path)
