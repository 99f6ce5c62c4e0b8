"""Tiny checkpoints on disk: random ones, and those of the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lora.io.save_checkpoint import save_checkpoint
from lora.spec import read_spec, tensor_shapes

GOLDEN = Path(__file__).parent.parent / "golden"

TINY_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 60,
    "pad_token_id": 60,
    "torch_dtype": "float32",
}

TINY_QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 61,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": True,
    "eos_token_id": 60,
    "pad_token_id": 60,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
    "dtype": "float32",
}

FAMILIES = {"qwen2": TINY_QWEN2, "qwen3_5": TINY_QWEN3_5}


def random_weights(config: dict[str, Any], seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return weights so large that attention is peaked and SiLU bends; norms and biases are not trivial."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(read_spec(config)).items():
        values = 0.25 * rng.standard_normal(shape)
        centred = config["model_type"].startswith("qwen3_5") and not name.endswith("linear_attn.norm.weight")
        weights[name] = (1 + values if name.endswith("norm.weight") and not centred else values).astype(dtype)
    return weights


def write_model(
    folder: Path, config: dict[str, Any] | None = None, seed: int = 0, dtype: Any = np.float32
) -> Path:
    """Write a checkpoint of random weights and return its folder."""
    config = TINY_QWEN2 if config is None else config
    save_checkpoint(folder, random_weights(config, seed, dtype), config)
    return folder


def golden(name: str) -> dict[str, Any]:
    """Return the arrays of a golden file; its JSON texts are parsed."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return {k: json.loads(str(v)) if v.dtype.kind == "U" else v for k, v in arrays.items()}


def below(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries under `prefix`/, by the rest of their names."""
    return {key[len(prefix) + 1 :]: value for key, value in arrays.items() if key.startswith(f"{prefix}/")}


def write_golden_model(folder: Path, arrays: dict[str, Any]) -> Path:
    """Write the checkpoint that a golden file was made from, by another library than our own writer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(below(arrays, "weight"), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(arrays["config"]))
    return folder


def write_golden_adapter(folder: Path, arrays: dict[str, Any]) -> Path:
    """Write the adapter of a golden file in PEFT's format, by another library than our own writer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(below(arrays, "adapter"), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(arrays["lora_config"]))
    return folder
