"""The half of a worker that both libraries share: read a job, take the first step, then do as told.

One line of JSON in for each command, one out for each answer. Nothing here imports an array library: the
time and the memory of importing one are the contestant's own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


@dataclass(frozen=True)
class Job:
    """What one contestant is to train."""

    model: str  # folder of the checkpoint
    adapter: str  # folder of the adapter
    batches: str  # JSON file
    gradients: str  # .npz that the first step's gradients are written to
    task: str  # "classify" or "causal"
    dtype: str
    device: str
    library: str
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    @classmethod
    def read(cls, path: str) -> Job:
        """Return the job in a JSON file."""
        return cls(**json.loads(Path(path).read_text()))


class Trainer(Protocol):
    """A loaded model with its adapter, its optimizer and its batches."""

    def step(self, index: int) -> float:
        """Forward, backward and update on one batch, to the end; return its loss."""

    def save_gradients(self, path: str) -> None:
        """Write the gradients of the last step by PEFT's names of their tensors."""

    def gemm(self) -> float:
        """Return the FLOP/s of a square product in this library's own precision."""

    def split(self, index: int) -> dict[str, float]:
        """Take one step, and return the seconds of its parts."""

    def facts(self) -> dict[str, Any]:
        """Return versions, threads and settings."""

    def device_peak(self) -> int | None:
        """Return the most bytes that were held on the device; None on a CPU."""


def serve(job: Job, load: Any) -> None:
    """Run a worker to the end of its input. `load` is given the job and returns a Trainer."""
    answers = private_stdout()
    baseline = peak_bytes()
    trainer: Trainer = load(job)
    loaded = peak_bytes()
    loss = trainer.step(0)
    write_answer(answers, {"loss": loss, "baseline_bytes": baseline, "loaded_bytes": loaded})
    trainer.save_gradients(job.gradients)
    write_answer(answers, trainer.facts())
    for line in sys.stdin:
        write_answer(answers, _obey(trainer, json.loads(line)))


def peak_bytes() -> int:
    """Return the most memory that this process has had resident, mapped pages that were touched included.

    That is ru_maxrss, but for what Linux lets a process inherit of it from the one that started it: VmHWM.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES


def rate_of(multiply: Any, flops: float) -> float:
    """Return the FLOP/s of `multiply`, the median of five after one that warms up."""
    multiply()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - start)
    return flops / sorted(seconds)[2]


def _obey(trainer: Trainer, command: dict[str, Any]) -> dict[str, Any]:
    match command:
        case {"do": "round", "batches": list() as indices}:
            start, processor = time.perf_counter(), time.process_time()
            losses = [trainer.step(index) for index in indices]
            return {
                "seconds": time.perf_counter() - start,
                "processor_seconds": time.process_time() - processor,
                "losses": losses,
            }
        case {"do": "gemm"}:
            return {"flops": trainer.gemm()}
        case {"do": "peak"}:
            return {"peak_bytes": peak_bytes(), "device_bytes": trainer.device_peak()}
        case {"do": "split", "batch": int() as index}:
            return {"split": trainer.split(index)}
    raise ValueError(f"no such command: {command}")


def private_stdout() -> TextIO:
    """Return the real standard output, and let everything that prints go to standard error."""
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return private


def write_answer(answers: TextIO, values: dict[str, Any]) -> None:
    """Write one line of JSON for the process that asked."""
    print(json.dumps(values), file=answers, flush=True)
