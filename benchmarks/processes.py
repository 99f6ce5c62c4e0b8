"""Workers as the parent sees them: started in a clean environment, told what to do, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.workers.serving import Job

ROOT = Path(__file__).parent.parent
# what chooses threads, kernels or caches of a BLAS or of OpenMP: each side starts as its users start it
_CHOOSERS = ("OPENBLAS_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "NUMEXPR_", "NVPL_", "TORCH_", "ATEN_")
_PAUSE = 0.1  # seconds; threads of the side that has just run spin for a while before they sleep


class WorkerError(Exception):
    """A worker ended before it answered; the message holds the end of what it printed."""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without what would favour one side, able to find this package, off the network."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_CHOOSERS)}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


class Conversation:
    """A process that is told something and answers, a line of JSON each way; its errors go to a file."""

    def __init__(self, python: str, module: str, arguments: Sequence[str], folder: Path) -> None:
        self._errors = folder / "errors.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=clean_environment(os.environ),
            )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises:
            WorkerError: the worker ended instead.
        """
        time.sleep(_PAUSE)
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next line that the process writes.

        Raises:
            WorkerError: it ended instead.
        """
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        tail = self._errors.read_text()[-3000:]
        raise WorkerError(f"{' '.join(self._process.args)} ended with {code}:\n{tail}")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker(Conversation):
    """One contestant of `step`, loaded and past its first step."""

    def __init__(self, python: str, module: str, job: Job, folder: Path) -> None:
        path = folder / "job.json"
        path.write_text(json.dumps(asdict(job)))
        start = time.perf_counter()
        super().__init__(python, module, [str(path)], folder)
        try:
            self.first = self.answer()
            self.first_step_seconds = time.perf_counter() - start
            self.facts = self.answer()
        except BaseException:
            self.close()
            raise
