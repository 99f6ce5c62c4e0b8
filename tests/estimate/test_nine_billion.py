"""A layer of each type of Qwen3.5-9B, at its real size, against the plan; run by name with --campaign."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import lora
from lora.backend import bfloat16
from lora.contracts import family_contract
from lora.data.packed import pack_causal
from lora.estimate import Workload, memory
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.spec import read_spec, tensor_shapes
from lora.train.optimizer import AdamW
from lora.train.step import train_step
from tests.harness.counted_memory import counted_memory

TOKENS = 256
CONFIG = {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    **family_contract("qwen3_5").sizes["9b"].config,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "vocab_size": 1024,
}


def write_layers(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = {
        name: (0.02 * rng.standard_normal(shape, dtype=np.float32)).astype(bfloat16)
        for name, shape in tensor_shapes(read_spec(CONFIG)).items()
    }
    save_checkpoint(folder, weights, CONFIG)
    return folder


@pytest.mark.campaign
def test_a_layer_of_each_type_trains_within_the_plan(tmp_path: Path) -> None:
    model = lora.load(write_layers(tmp_path / "base"))
    model.add_adapter(LoraConfig())
    optimizer, rng = AdamW(model, 1e-4), np.random.default_rng(1)
    batch = pack_causal([rng.integers(0, 1024, TOKENS)])
    tracemalloc.start()
    try:
        with counted_memory():
            for _ in range(2):  # the moments are made at the end of the first
                tracemalloc.reset_peak()
                report = train_step(model, optimizer, [batch], lr=1e-4, clip=1.0, micro_tokens=TOKENS)
            measured = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    needed = memory(
        Workload(model.spec, "causal", "lora", LoraConfig()), TOKENS, longest=TOKENS, accumulates=False
    )
    planned = needed.total - needed.model - needed.adapter
    print(f"a step takes {measured / 1e6:.1f} MB beside the weights, planned {planned / 1e6:.1f} MB")
    assert np.isfinite(report.gradient_norm)
    assert report.gradient_norm > 0
    assert measured <= planned
