"""The models that are measured: published sizes, random weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cases import CLASSES, Task
from lora.contracts import family_contract
from lora.spec import ModelSpec, read_spec, tensor_shapes

SCORE = "score.weight"
_NAMES = {"qwen2": ("qwen2", "Qwen2"), "qwen3_5": ("qwen3_5_text", "Qwen3_5")}
_SPECIAL_TOKENS = 256  # the last ids of the vocabulary; no row of a benchmark holds one


def _published(family: str, size: str) -> dict[str, Any]:
    return {"model_type": _NAMES[family][0], **family_contract(family).sizes[size].config}


def _small_qwen3_5() -> dict[str, Any]:
    """Return Qwen3.5-0.8B with half of its width and heads, 8 of 24 layers, an eighth of the vocabulary."""
    return {
        **_published("qwen3_5", "0.8b"),
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "intermediate_size": 1792,
        "vocab_size": 31040,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
    }


def _tiny() -> dict[str, Any]:
    """Return a Qwen2.5 that trains in a moment."""
    return {
        **_published("qwen2", "0.5b"),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 512,
    }


CONFIGS = {
    "qwen2.5-tiny": _tiny,
    "qwen2.5-0.5b": lambda: _published("qwen2", "0.5b"),
    "qwen3.5-small": _small_qwen3_5,
}


def config(model: str, task: Task) -> dict[str, Any]:
    """Return the config.json of `model` with the head that `task` needs, as Transformers reads it."""
    values = CONFIGS[model]()
    family = "qwen2" if values["model_type"] == "qwen2" else "qwen3_5"
    prefix, last = _NAMES[family][1], values["vocab_size"] - 1
    values |= {"eos_token_id": last, "pad_token_id": last, "hidden_act": "silu"}
    if task == "causal":
        return values | {"architectures": [f"{prefix}ForCausalLM"]}
    text = "" if family == "qwen2" else "Text"
    return values | {
        "architectures": [f"{prefix}{text}ForSequenceClassification"],
        "num_labels": CLASSES,
        "id2label": {str(index): str(index) for index in range(CLASSES)},
        "label2id": {str(index): index for index in range(CLASSES)},
    }


def content_ids(config: dict[str, Any]) -> int:
    """Return how many ids a row of data may hold: special tokens, padding among them, stay out of it."""
    return config["vocab_size"] - min(_SPECIAL_TOKENS, config["vocab_size"] // 2)


def shapes(config: dict[str, Any], task: Task) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint by canonical name."""
    spec = read_spec(config)
    if task == "causal":
        return tensor_shapes(spec)
    body = {name: shape for name, shape in tensor_shapes(spec).items() if name != "lm_head.weight"}
    return {**body, SCORE: (CLASSES, spec.hidden_size)}


def random_tensor(spec: ModelSpec, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return one tensor, float32: weights as a fresh model has them, norms and gates near where they train.

    Norms and biases are not trivial, or a mistake in them would cost nothing and change nothing.
    """
    values = rng.standard_normal(shape, np.float32)
    values *= spec.initializer_range
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    centred = spec.zero_centred_norm and not name.endswith("linear_attn.norm.weight")
    if name.endswith("dt_bias") or (name.endswith("norm.weight") and not centred):
        values += 1
    return values


def multiplied_parameters(config: dict[str, Any], task: Task) -> int:
    """Return N of the 4 N FLOP a token: the elements of every matrix that a token is multiplied with.

    An embedding is looked up, so it counts only where it is the language model's head as well. A classifier's
    head meets a pooled row, not each token. Convolutions, attention and the delta rule are not in N.
    """
    found = shapes(config, task)
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in found.items()
        if len(shape) == 2 and name not in ("model.embed_tokens.weight", SCORE)
    )
    tied = task == "causal" and "lm_head.weight" not in found
    return matrices + (config["vocab_size"] * config["hidden_size"] if tied else 0)


def attention_flops(config: dict[str, Any], lengths: list[int]) -> int:
    """Return the FLOP of attention's own products in one step over rows of `lengths` tokens.

    Of what a causal mask shows alone: two products forward, and five backward, where the scores are made
    again (arXiv:2205.14135).
    """
    spec = read_spec(config)
    pairs = sum(tokens * (tokens + 1) // 2 for tokens in lengths)
    width = spec.num_attention_heads * spec.head_dim
    return spec.layer_types.count("full_attention") * 7 * 2 * pairs * width
