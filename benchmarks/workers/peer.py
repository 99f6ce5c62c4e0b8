"""The side of Transformers + PEFT: `python -m benchmarks.workers.peer JOB.json`, in the peers' environment.

Their best common setting: SDPA attention, no gradient checkpointing, no cache, weights in the precision that
is measured, fused AdamW, the attention mask left out where no row is padded (SDPA is then told that it is
causal, and skips half the work). PEFT's own default keeps adapters in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks.workers.serving import Job, rate_of, serve

GEMM_SIZE = 2048
IGNORED = -100
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Trainer:
    """A PEFT model as its documentation loads one; rows are padded on the right to the longest."""

    def __init__(self, job: Job) -> None:
        self.device, self.dtype = torch.device(job.device), getattr(torch, job.dtype)
        base = _auto_class(job).from_pretrained(job.model, dtype=self.dtype, attn_implementation="sdpa")
        self.pad = base.config.pad_token_id
        self.model = peft.PeftModel.from_pretrained(base, job.adapter, is_trainable=True).to(self.device)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=job.learning_rate, weight_decay=job.weight_decay, fused=True
        )
        self.batches = json.loads(Path(job.batches).read_text())

    def step(self, index: int) -> float:
        """See `serving.Trainer`."""
        self.optimizer.zero_grad(set_to_none=True)
        inputs = {
            name: tensor.to(self.device) for name, tensor in padded(self.batches[index], self.pad).items()
        }
        loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def save_gradients(self, path: str) -> None:
        """See `serving.Trainer`."""
        np.savez(
            path,
            **{
                peft_name(name): parameter.grad.float().cpu().numpy()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            },
        )

    def gemm(self) -> float:
        """See `serving.Trainer`."""
        a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=self.device).to(self.dtype)

        def multiply() -> None:
            a @ a
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return rate_of(multiply, 2 * GEMM_SIZE**3)

    def split(self, index: int) -> dict[str, float]:
        """See `serving.Trainer`. Parts are PyTorch's operators by kind, from its own profiler."""
        with torch.profiler.profile() as profile:
            self.step(index)
        seconds: dict[str, float] = {}
        for event in profile.key_averages():
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        return seconds

    def facts(self) -> dict[str, Any]:
        """See `serving.Trainer`."""
        return {
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "python": sys.version.split()[0],
            },
            "blas": {
                "library": "torch",
                "core": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
        }

    def device_peak(self) -> int | None:
        """See `serving.Trainer`."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def padded(batch: dict[str, Any], pad: int) -> dict[str, torch.Tensor]:
    """Return a batch of the file as the arguments of a model of Transformers."""
    rows, longest = batch["rows"], max(map(len, batch["rows"]))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    causal = batch["labels"] is None
    labels = ids.masked_fill(~mask, IGNORED) if causal else torch.tensor(batch["labels"])
    inputs = {"input_ids": ids, "labels": labels}
    return inputs if mask.all() else inputs | {"attention_mask": mask.long()}


def peft_name(name: str) -> str:
    """Return the name on disk of a parameter of a PEFT model whose adapter is called "default"."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def kind_of(operator: str) -> str:
    """Return which of a few parts an operator of PyTorch belongs to."""
    if operator in _PRODUCTS:
        return "products"
    if "attention" in operator:
        return "attention"
    return "other"


def _auto_class(job: Job) -> Any:
    if job.task == "classify":
        return transformers.AutoModelForSequenceClassification
    if job.library == "peft-liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        return AutoLigerKernelForCausalLM
    return transformers.AutoModelForCausalLM


if __name__ == "__main__":
    serve(Job.read(sys.argv[1]), Trainer)
