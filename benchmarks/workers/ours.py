"""This library's side of `step`: `python -m benchmarks.workers.ours JOB.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora  # first: it may choose how NumPy's BLAS starts
from benchmarks.workers.serving import Job, rate_of, serve

import numpy as np  # isort: skip
import lora.backend as backend  # isort: skip
from lora.backend.device import cupy_module  # isort: skip
from lora.data.packed import Packed, pack, pack_causal  # isort: skip
from lora.dispatch import Ops  # isort: skip

GEMM_SIZE = 2048
_TIMED = ("forward", "backward", "update")


class Trainer:
    """The model as `lora.load` gives it; rows are packed end to end, as `lora finetune` packs them."""

    def __init__(self, job: Job) -> None:
        self.model = lora.load(job.model, job.device, job.dtype)
        self.model.load_adapter(job.adapter)
        self.optimizer = lora.AdamW(self.model, job.learning_rate, weight_decay=job.weight_decay)
        self.batches = json.loads(Path(job.batches).read_text())
        self.gradients: dict[str, Any] = {}
        self.cupy = cupy_module() if job.device == "cuda" else None

    def step(self, index: int) -> float:
        """See `serving.Trainer`."""
        self.gradients = {}  # one set of gradients at a time
        result = self.model.step(packed(self.batches[index]))
        self.optimizer.step(result.gradients)
        self.gradients = result.gradients
        self._finish()
        return result.loss

    def save_gradients(self, path: str) -> None:
        """See `serving.Trainer`."""
        np.savez(path, **{name: backend.to_host(array) for name, array in self.gradients.items()})

    def gemm(self) -> float:
        """See `serving.Trainer`."""
        a = np.random.default_rng(0).standard_normal((GEMM_SIZE, GEMM_SIZE), np.float32)
        if self.cupy is not None:
            a = self.cupy.asarray(a.astype(backend.bfloat16))

        def multiply() -> None:
            backend.matmul(a, a)
            self._finish()

        return rate_of(multiply, 2 * GEMM_SIZE**3)

    def split(self, index: int) -> dict[str, float]:
        """See `serving.Trainer`. Parts are the operations; what is outside them is "between"."""
        seconds: dict[str, float] = {}
        plain = self.model.ops
        self.model.ops = timed_ops(plain, seconds)
        start = time.perf_counter()
        try:
            self.step(index)
        finally:
            self.model.ops = plain
        whole = time.perf_counter() - start
        return {**seconds, "between": whole - sum(seconds.values())}

    def facts(self) -> dict[str, Any]:
        """See `serving.Trainer`."""
        return {
            "versions": {"lora": lora.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
            "blas": backend.blas_facts(),
        }

    def device_peak(self) -> int | None:
        """See `serving.Trainer`. CuPy's pool gives nothing back, so what it holds is the most it held."""
        return None if self.cupy is None else self.cupy.get_default_memory_pool().total_bytes()

    def _finish(self) -> None:
        """Wait for the device."""
        if self.cupy is not None:
            self.cupy.cuda.get_current_stream().synchronize()


def packed(batch: dict[str, Any]) -> Packed:
    """Return a batch of the file, packed: a class a row, or the next token everywhere."""
    rows = [np.array(row, np.int64) for row in batch["rows"]]
    if batch["labels"] is None:
        return pack_causal(rows)
    return pack(rows, np.array(batch["labels"], np.int64))


def timed_ops(ops: Ops, seconds: dict[str, float]) -> Ops:
    """Return `ops` with every call added up in `seconds` by "operation function"."""

    def timed(label: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start

        return call

    def wrapped(name: str, module: Any) -> SimpleNamespace:
        functions = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        functions |= {key: timed(f"{name} {key}", functions[key]) for key in _TIMED if key in functions}
        return SimpleNamespace(**functions)

    return Ops(**{name: wrapped(name, module) for name, module in ops._asdict().items()})


if __name__ == "__main__":
    serve(Job.read(sys.argv[1]), Trainer)
