"""Record which tensors Transformers gives models of many sizes, as an oracle from outside.

Run by hand, never in CI, in the environment that tests/golden/README.md names:
python tests/spec/make_transformers_shapes.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

HERE = Path(__file__).parent
FAMILIES = HERE.parents[1] / "contracts" / "model-families"
VISION = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "out_hidden_size": 16}


def record(model_class: type, config: object, **extra: object) -> dict[str, object]:
    """Return config.json and the parameters of an uninitialised model; tied ones occur once."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "parameters": count,
        **extra,
        "tensors": shapes,
    }


def random_qwen2(rng: random.Random) -> Qwen2Config:
    """A small model whose every width differs from the others, where it may."""
    groups, share, width = rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(2, 6)
    return Qwen2Config(
        vocab_size=rng.randint(30, 60),
        hidden_size=rng.randint(3, 9) * groups * share * 2,
        intermediate_size=rng.randint(17, 50),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=groups * share,
        num_key_value_heads=groups,
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **({"head_dim": width} if rng.random() < 0.5 else {}),
    )


def random_qwen3_5(rng: random.Random) -> Qwen3_5TextConfig:
    """A small hybrid model; the pattern of its layers is drawn as well."""
    groups, share, key_heads = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 3)
    layers = rng.randint(1, 5)
    return Qwen3_5TextConfig(
        vocab_size=rng.randint(30, 60),
        hidden_size=rng.randint(11, 40),
        intermediate_size=rng.randint(17, 50),
        num_hidden_layers=layers,
        num_attention_heads=groups * share,
        num_key_value_heads=groups,
        head_dim=8 * rng.randint(1, 3),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * rng.randint(1, 3),
        linear_key_head_dim=rng.randint(3, 9),
        linear_value_head_dim=rng.randint(3, 9),
        linear_conv_kernel_dim=rng.randint(2, 5),
        layer_types=[rng.choice(["linear_attention", "full_attention"]) for _ in range(layers)],
        tie_word_embeddings=rng.random() < 0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    )


def multimodal(rng: random.Random) -> Qwen3_5Config:
    """A random text model inside a multimodal one, with the rotation that the published files state."""
    text = random_qwen3_5(rng).to_dict()
    text["rope_parameters"] |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return Qwen3_5Config(
        text_config=text, vision_config=VISION, tie_word_embeddings=text["tie_word_embeddings"]
    )


def named_sizes(family: str, config_class: type, model_class: type) -> list[dict[str, object]]:
    """Return config.json and the parameter count of every size that the contract names."""
    contract = yaml.safe_load((FAMILIES / f"{family}.yaml").read_text(encoding="utf-8"))
    records = []
    for size, entry in contract["sizes"].items():
        keys = dict(entry["config"])
        rope = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
        if "partial_rotary_factor" in keys:
            rope["partial_rotary_factor"] = keys.pop("partial_rotary_factor")
        found = record(model_class, config_class(**keys, rope_parameters=rope), size=size)
        del found["tensors"]
        records.append(found)
    return records


def main() -> None:
    """Write every record, one a line."""
    rng = random.Random(0)
    families = {
        "qwen2": [
            *named_sizes("qwen2", Qwen2Config, Qwen2ForCausalLM),
            *(record(Qwen2ForCausalLM, random_qwen2(rng)) for _ in range(8)),
        ],
        "qwen3_5": [
            *named_sizes("qwen3_5", Qwen3_5TextConfig, Qwen3_5ForCausalLM),
            *(record(Qwen3_5ForCausalLM, random_qwen3_5(rng)) for _ in range(8)),
            *(record(Qwen3_5ForConditionalGeneration, multimodal(rng)) for _ in range(3)),
        ],
    }
    with (HERE / "transformers_shapes.jsonl").open("w", encoding="utf-8") as file:
        for family, records in families.items():
            for entry in records:
                file.write(json.dumps({"family": family, **entry}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
