"""One point of `scaling`: `python -m benchmarks.workers.one_size JOB.json` prints seconds and bytes.

A process of its own for each point: buffers that the library keeps would hide what the next size takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import lora
from benchmarks import models
from benchmarks.data import draw
from benchmarks.workers.ours import packed

import numpy as np  # isort: skip
from benchmarks.cases import Lengths  # isort: skip
from lora.backend import bfloat16, memory, named_stream  # isort: skip
from lora.io.save_checkpoint import save_checkpoint  # isort: skip
from lora.spec import read_spec  # isort: skip

STEPS = 8


def main(path: str) -> None:
    """Measure the job in a file."""
    job = json.loads(Path(path).read_text())
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), job["config"])
        # the allocator's count slows Python down: memory and time are of two models
        print(json.dumps({"bytes": peak_bytes(folder, job), "seconds": fastest_step(folder, job)}))


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights of these sizes."""
    spec = read_spec(config)
    tensors = {
        name: models.random_tensor(spec, name, shape, named_stream(0, name)).astype(bfloat16)
        for name, shape in models.shapes(config, "causal").items()
    }
    save_checkpoint(folder, tensors, config | {"torch_dtype": "bfloat16"})


def trainer(folder: str, job: dict[str, Any]) -> Any:
    """Return a function that takes one step on the job's rows."""
    model = lora.load(folder)
    model.add_adapter(lora.LoraConfig(r=job["rank"], target_modules="all-linear"))
    optimizer = lora.AdamW(model, 1e-4)
    rows = Lengths(rows=job["rows"], tokens=job["tokens"])
    batch = packed(draw(rows, "causal", job["config"]["vocab_size"], 1, 0)[0].as_json())
    return lambda: optimizer.step(model.step(batch).gradients)


def peak_bytes(folder: str, job: dict[str, Any]) -> int:
    """Return the most bytes that arrays took: adapters, moments, gradients, activations, and what is kept.

    NumPy reports every array; the mapped base is none of them. Slabs are as large as what first needs them:
    addresses of one that nothing was written to would be counted, and are no memory.
    """
    slab, memory.SLAB_BYTES = memory.SLAB_BYTES, 0
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    step = trainer(folder, job)
    step()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    memory.SLAB_BYTES = slab
    return peak - before


def fastest_step(folder: str, job: dict[str, Any]) -> float:
    """Return the seconds of the fastest step: what others do to a step can only add to it."""
    step, seconds = trainer(folder, job), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return float(np.min(seconds[1:]))


if __name__ == "__main__":
    main(sys.argv[1])
