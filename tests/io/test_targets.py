"""Which modules are adapted: PEFT's own answers, and the typos that PEFT lets pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora import spec
from lora.errors import AdapterError
from lora.io.lora_config import LoraConfig
from lora.io.targets import SHORTHANDS, expanded, match_targets
from lora.spec import canonical_name

RECORDS = [
    json.loads(line) for line in (Path(__file__).parent / "peft_targets.jsonl").read_text().splitlines()
]
HYBRID = ["linear_attention", "full_attention"] * 2


def modules(family: str) -> dict[str, tuple[int, int]]:
    """The modules of the models that tests/io/make_peft_targets.py asked PEFT about."""
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    linear = {
        "num_key_heads": 1,
        "num_value_heads": 2,
        "key_head_dim": 4,
        "value_head_dim": 6,
        "conv_kernel_dim": 4,
    }
    if family == "qwen3_5":
        config |= {f"linear_{key}": value for key, value in linear.items()} | {"layer_types": HYBRID}
    return spec.adaptable_modules(spec.read_spec(config))


@pytest.mark.parametrize(
    "record", RECORDS, ids=lambda r: f"{r['family']}-{r['layout']}-{json.dumps(r['settings'])}"
)
def test_modules_ranks_and_scales_are_pefts(record: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=6, **record["settings"])
    found = match_targets(config, modules(record["family"]), layout=record["layout"])
    expected = {
        canonical_name(name, record["layout"]): (r, alpha, pytest.approx(scale, rel=1e-15))
        for name, (r, alpha, scale) in record["adapted"].items()
    }
    assert found == expected


@pytest.mark.parametrize(
    ("shorthand", "family", "names"),
    [
        ("qv", "qwen2", "q_proj v_proj"),
        ("qv", "qwen3_5", "q_proj v_proj in_proj_qkv"),
        ("attention", "qwen2", "q_proj k_proj v_proj o_proj"),
        ("attention", "qwen3_5", "q_proj k_proj v_proj o_proj in_proj_qkv in_proj_z out_proj"),
        ("mlp", "qwen3_5", "gate_proj up_proj down_proj"),
        ("all-linear", "qwen2", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (
            "all-linear",
            "qwen3_5",
            "q_proj k_proj v_proj o_proj in_proj_qkv in_proj_z out_proj gate_proj up_proj down_proj",
        ),
    ],
)
def test_shorthands(shorthand: str, family: str, names: str) -> None:
    found = match_targets(LoraConfig(target_modules=shorthand), modules(family))
    assert set(found) == {name for name in modules(family) if name.rpartition(".")[2] in names.split()}
    written = expanded(LoraConfig(target_modules=shorthand), modules(family))
    assert (written.target_modules, written.lora_alpha) == (tuple(names.split()), 32)
    assert match_targets(written, modules(family)) == found


def test_only_the_listed_words_are_shorthands() -> None:
    assert set(SHORTHANDS) == {"qv", "attention", "mlp", "all-linear"}
    regex = LoraConfig(target_modules=r".*\.q_proj")
    assert expanded(regex, modules("qwen2")).target_modules == r".*\.q_proj"


def test_the_published_counts_of_trained_parameters() -> None:
    def stored(size: str, targets: str, r: int) -> int:
        shapes = spec.adaptable_modules(spec.size_spec(size))
        found = match_targets(LoraConfig(r=r, target_modules=targets), shapes)
        return sum(factor.r * sum(shapes[name]) for name, factor in found.items())

    assert stored("0.5b", "qv", 8) == 540_672
    assert stored("0.5b", "all-linear", 16) == 8_798_208
    assert stored("9b", "qv", 16) == 6_946_816
    assert stored("9b", "all-linear", 16) == 40_108_032


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target 'v_porj'"),
        ({"target_modules": ["proj"]}, "target 'proj'"),
        ({"target_modules": ["lm_head"]}, "target 'lm_head'"),
        ({"target_modules": r"q_proj"}, "target 'q_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [4]}, "target_modules"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "block"},
            "target_modules",
        ),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern 'v_proj'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"self_attn": 2}}, "rank_pattern 'self_attn'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"proj": 2}}, "alpha_pattern 'proj'"),
    ],
)
def test_what_matches_nothing_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterError, match=named):
        match_targets(LoraConfig(**settings), modules("qwen2"))


def test_a_pattern_of_two_words_is_one_pattern() -> None:
    config = LoraConfig(target_modules=["q_proj", "up_proj"], alpha_pattern={"self_attn.q|up_proj": 5})
    found = match_targets(config, modules("qwen2"))
    assert {name: sizes.alpha for name, sizes in found.items() if sizes.alpha != 32} == {
        f"model.layers.{i}.mlp.up_proj": 5 for i in range(4)
    }


def test_layers_are_counted_by_the_first_number_of_a_name() -> None:
    nested = {"model.layers.1.experts.0.up_proj": (2, 2), "model.layers.0.experts.1.up_proj": (2, 2)}
    config = LoraConfig(target_modules=["up_proj"], layers_to_transform=[1])
    assert list(match_targets(config, nested)) == ["model.layers.1.experts.0.up_proj"]
