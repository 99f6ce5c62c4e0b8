"""The half of a worker of `kernels` that every contestant shares: load one shape, compare, then time.

One line of JSON in for each command, one out for each answer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from benchmarks.agreement import difference
from benchmarks.device_time import Device, device_seconds
from benchmarks.registry import Calls, draw
from benchmarks.workers.serving import private_stdout, write_answer


class Side(Protocol):
    """One array library with its implementations of the operations."""

    device: Device
    refusals: tuple[type[BaseException], ...]  # what says that a contestant cannot run a shape

    def facts(self) -> dict[str, Any]:
        """Return versions and settings."""

    def calls(self, contestant: str, operation: str, arrays: Any) -> Calls:
        """Return what is timed of a contestant, for the `Inputs` of a shape."""

    def to_host(self, array: Any) -> np.ndarray:
        """Return an output as float32."""

    def release(self) -> None:
        """Give back memory that is held for later."""


def serve_kernels(side: Side, **questions: Callable[[], dict[str, Any]]) -> None:
    """Run a worker to the end of its input; `questions` are commands of this side alone."""
    answers = private_stdout()
    write_answer(answers, side.facts())
    loaded: Calls = {}
    for line in sys.stdin:
        match json.loads(line):
            case {"do": "agree", **case}:
                loaded = {}
                side.release()
                try:
                    arrays = draw(case["operation"], case["shape"], case["seed"])
                    loaded = side.calls(case["contestant"], case["operation"], arrays)
                    write_answer(answers, {"apart": apart(side, loaded, case["expected"])})
                except side.refusals as error:
                    loaded = {}
                    write_answer(answers, {"refused": _reason(error)})
            case {"do": "time", "call": str() as name, "runs": int() as runs}:
                write_answer(answers, {"seconds": device_seconds(loaded[name], side.device, runs)})
            case {"do": "used"}:
                write_answer(answers, {"seconds": time.process_time()})
            case {"do": str() as question} if question in questions:
                write_answer(answers, questions[question]())
            case command:
                raise ValueError(f"no such command: {command}")


def apart(side: Side, calls: Calls, expected: str) -> dict[str, float]:
    """Make every call once; return how far each output is from that in the file `expected`, norm-wise."""
    with np.load(expected) as reference:
        found = {
            f"{name} {output}": difference(side.to_host(array), reference[f"{name} {output}"])
            for name, call in calls.items()
            for output, array in call().items()
        }
        missing: Mapping[str, float] = dict.fromkeys(set(reference) - set(found), float("inf"))
    return {**found, **missing}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
