"""What is expected of compiled kernels, one file in expected/ for each file of kernels.

    python -m tests.compile.record [rmsnorm.cu ...]

records what the kernels of these files, or of all, take now. A change that raises a number says why in its
commit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from lora.backend import Kernel
from tests.compile.instances import ARCHITECTURES, Build, build, kernels

EXPECTED = Path(__file__).parent / "expected"
HEAD = """\
# instructions, by hand: what the machine code of the instances that a pattern (fnmatch) names must hold; HMMA
# for tensor cores, LDSM for ldmatrix, LDGSTS for asynchronous copies to shared memory.
# usage, by `python -m tests.compile.record`: the most that an instance may take, registers of a thread and
# bytes of a block's shared memory, static and dynamic.
"""

Taken = dict[str, int]  # "registers" and "shared"


class Expected(NamedTuple):
    """What is expected of the kernels of one file."""

    instructions: dict[str, list[str]]  # by pattern of the instance's name
    usage: dict[str, dict[str, Taken]]  # by architecture and instance


def expected(file: str) -> Expected:
    """Return what was recorded for `file` of the kernels folder; nothing where it was not yet."""
    path = _path(file)
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Expected(found.get("instructions") or {}, found.get("usage") or {})


def taken(kernel: Kernel, build: Build) -> Taken:
    """Return what a kernel takes, as it is recorded."""
    return {"registers": build.usage.registers, "shared": build.usage.shared_bytes + kernel.shared_bytes}


def record(file: str) -> None:
    """Write what the kernels of `file` take now; what was written by hand stays."""
    own = [kernel for kernel in kernels() if kernel.file == file]
    usage = {arch: {k.name: taken(k, build(k, arch)) for k in own} for arch in ARCHITECTURES}
    content = {"instructions": expected(file).instructions, "usage": usage}
    # flow style for what holds no mapping: one line an instance
    text = yaml.dump(content, sort_keys=True, default_flow_style=None, width=1000)
    _path(file).write_text(HEAD + text, encoding="utf-8")


def _path(file: str) -> Path:
    return EXPECTED / f"{file.removesuffix('.cu')}.yaml"


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for name in sys.argv[1:] or sorted({kernel.file for kernel in kernels()}):
        record(name)
