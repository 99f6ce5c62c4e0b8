"""Run the operations' tests on a GPU under NVIDIA's compute-sanitizer, on few and small cases.

    python -m tests.sanitize                                # memcheck, then racecheck, all operations
    python -m tests.sanitize --tools racecheck --operations attention

Exit codes: 0, 1 where a tool or a test found something, 2 for a wrong call, 5 without a GPU or the tool.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import NO_GPU, cuda_device
from benchmarks.results import NOTHING_MEASURED
from lora.backend import toolkit
from lora.backend.device import cupy_module
from lora.errors import DeviceError

ROOT = Path(__file__).parent.parent
OPERATIONS = sorted(path.stem for path in (ROOT / "lora" / "cuda").glob("[!_]*.py"))
TOOLS = ("memcheck", "racecheck")
TOOL = "compute-sanitizer"
ADVICE = f"{TOOL} was not found: pip install nvidia-cuda-sanitizer-api, or put a CUDA toolkit's bin on PATH"
_UNDER_TOOL = "--under-tool"  # what the command adds to start itself inside


def main(arguments: list[str]) -> int:
    """Run every tool asked for; return the exit code."""
    if arguments[:1] == [_UNDER_TOOL]:
        return run_tests(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="OP")
    options = parser.parse_args(arguments)
    sanitizer = find_tool()
    if cuda_device() is None or sanitizer is None:
        print(f"sanitize: not run: {NO_GPU if cuda_device() is None else ADVICE}")
        return NOTHING_MEASURED
    # every tool runs, whatever another one found
    return max([run_tool(sanitizer, tool, options.operations) for tool in options.tools])


def find_tool() -> str | None:
    """Return the path of compute-sanitizer: on PATH, or beside CUDA's headers; None where there is none."""
    for major in toolkit.majors():
        try:
            beside = toolkit.headers(major).parent / "bin"
        except DeviceError:
            continue
        if found := shutil.which(TOOL, path=beside):
            return found
    return shutil.which(TOOL)


def run_tool(sanitizer: str, tool: str, operations: list[str]) -> int:
    """Run the tests of `operations` under one tool; return 1 where anything was found, else 0."""
    watched = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    command = [*watched, sys.executable, "-m", "tests.sanitize", _UNDER_TOOL, *operations]
    print(f"{tool}: {', '.join(operations)}", flush=True)
    environment = os.environ | {"HYPOTHESIS_PROFILE": "few"}
    return int(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0)


def run_tests(operations: list[str]) -> int:
    """Run the tests that a GPU takes part in, in this process; return pytest's exit code."""
    # a pool hands out parts of large blocks: what is past an array's end would be memory that may be touched
    cupy_module().cuda.set_allocator(None)
    files = [f"tests/ops/test_{operation}.py" for operation in operations]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--gpu", "-m", "gpu", *files]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
