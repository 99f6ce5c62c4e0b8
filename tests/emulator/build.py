"""Kernel files as libraries of the host: g++ over the unmodified source and the machine of cpp/.

A library holds any number of instances of one file. It is kept under a hash of every text that goes into it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lora.backend.cubin_cache import cache_folder
from lora.backend.sources import reachable

CPP = Path(__file__).parent / "cpp"
MISSING = "the emulator of CUDA kernels needs g++, and there is none on PATH"
# contraction would fuse products and sums here and there; hidden symbols keep the static shared memory
# of one library apart from that of the next, which may hold a changed copy of the same kernel
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    f"-I{CPP}",
)


class BuildError(Exception):
    """A kernel file that g++ refuses, with the compiler's words, or a machine without g++."""


def available() -> bool:
    """Say whether kernels can be built here."""
    return shutil.which("g++") is not None


@cache
def library(source: Path, names: Sequence[str]) -> ctypes.CDLL:
    """Return the library of the instances `names` of `source`; `symbol` names each of them in it.

    Raises:
        BuildError: the source does not compile, or there is no compiler.
    """
    exports = "".join(f"CUDA_CPU_EXPORT({symbol(name)}, {name})\n" for name in names)
    unit = f'#include "{source}"\n{exports}'
    texts = [text for _, text in sorted(reachable(source, (CPP,)).items())]
    machine = [str(_machine(name)) for name in ("machine.cpp", "instructions.cpp")]
    options = ["-shared", "-include", "instructions.h", *machine]
    # by the texts alone: where the source lies changes nothing
    path = _built(f"{source.stem}-{_key([exports, *texts])}.so", unit, options)
    return ctypes.CDLL(str(path))


def symbol(name: str) -> str:
    """Return what the instance `name` is called in a library."""
    return f"kernel_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@cache
def edited(folder: Path, edits: tuple[tuple[str, str, str], ...]) -> Path:
    """Return a copy of `folder` with each edit (file, old text, new text) made.

    Raises:
        ValueError: the old text does not stand in its file exactly once.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cu*"))}
    for file, old, new in edits:
        if (times := texts[file].count(old)) != 1:
            raise ValueError(f"{file}: expected the text to replace once, found it {times} times: {old!r}")
        texts[file] = texts[file].replace(old, new)
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:20]
    copy = _cache() / f"edited-{digest}"
    if not copy.is_dir():
        scratch = Path(tempfile.mkdtemp(dir=_cache()))
        for name, text in texts.items():
            (scratch / name).write_text(text, encoding="utf-8")
        try:
            scratch.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(scratch)
    return copy


def _machine(name: str) -> Path:
    """Return the object file of a part of the machine; every library contains it."""
    return _built(f"{Path(name).stem}-{_key([])}.o", f'#include "{CPP / name}"\n', ["-c"])


def _built(name: str, unit: str, options: Sequence[str]) -> Path:
    """Compile the text `unit` to the file `name` of the cache, unless it is there."""
    target = _cache() / name
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        text, output = Path(scratch, "unit.cpp"), Path(scratch, name)
        text.write_text(unit, encoding="utf-8")
        command = ["g++", *FLAGS, str(text), *options, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr)
        os.replace(output, target)
    return target


def _cache() -> Path:
    folder = cache_folder().parent / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(texts: Sequence[str | bytes]) -> str:
    """Return a hash of the compiler, the machine and `texts`."""
    machine = [file.read_bytes() for file in sorted(CPP.iterdir())]
    parts = [_compiler(), *FLAGS[:-1], *machine, *texts]
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:20]


@cache
def _compiler() -> str:
    if not available():
        raise BuildError(MISSING)
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
