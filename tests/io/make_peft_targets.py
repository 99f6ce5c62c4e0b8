"""Record which modules PEFT adapts, and with which rank and scale, as an oracle from outside.

Run by hand, never in CI, in the environment that tests/golden/README.md names:
python tests/io/make_peft_targets.py
"""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.25},
}
VISION = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "out_hidden_size": 16}
CONFIGS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.o_proj", "down_proj"], "use_rslora": True},
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": r".*layers\.[12]\..*gate_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["up_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["mlp.gate_proj"]},
    {"target_modules": ["gate_proj", "up_proj"], "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2, r"layers\.1\..*": 5}},
    {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.1.self_attn.v_proj": 11, "v_proj": 7},
        "rank_pattern": {"q_proj": 1},
        "use_rslora": True,
    },
    {"target_modules": ["q_proj"], "rank_pattern": {r"q.*": 6, r".*q_proj": 3}},
]
HYBRID_CONFIGS = [
    {"target_modules": ["in_proj_qkv", "out_proj", "in_proj_a", "q_proj"]},
    {"target_modules": r".*language_model.*linear_attn\.in_proj_z", "only": "multimodal"},
]


def adapted(model: object, settings: dict[str, object]) -> dict[str, tuple[int, float, float]]:
    """Return (r, alpha, scale) of every adapted module, by its name in the base model."""
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **settings))
    found = {
        name.removeprefix("base_model.model."): (
            module.r["default"],
            module.lora_alpha["default"],
            module.scaling["default"],
        )
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and "visual" not in name
    }
    peft.unload()
    return found


def main() -> None:
    """Write every record, one a line."""
    text = Qwen3_5TextConfig(**SIZES, **DELTA)
    multimodal = Qwen3_5Config(text_config=text.to_dict(), vision_config=VISION)
    models = {
        "qwen2": ("text", lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=ROPE)), CONFIGS),
        "qwen3_5": ("text", lambda: Qwen3_5ForCausalLM(text), CONFIGS + HYBRID_CONFIGS),
        "qwen3_5 multimodal": (
            "multimodal",
            lambda: Qwen3_5ForConditionalGeneration(multimodal),
            CONFIGS + HYBRID_CONFIGS,
        ),
    }
    with (HERE / "peft_targets.jsonl").open("w", encoding="utf-8") as file:
        for name, (layout, make, configs) in models.items():
            for config in configs:
                settings = {key: value for key, value in config.items() if key != "only"}
                if config.get("only", layout) != layout:
                    continue
                entry = {"family": name.split()[0], "layout": layout, "settings": settings}
                file.write(json.dumps(entry | {"adapted": adapted(make(), settings)}) + "\n")


if __name__ == "__main__":
    main()
