"""Settings of an adapter: our defaults, PEFT's names, and what is refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from lora.errors import AdapterError, UnsupportedError
from lora.io.lora_config import LoraConfig


def test_our_defaults_are_valid() -> None:
    config = LoraConfig()
    config.validate()
    assert (config.r, config.alpha, config.target_modules, config.init_lora_weights) == (
        16,
        32,
        "qv",
        "gaussian",
    )


def test_lists_and_sets_are_frozen() -> None:
    names = ["q_proj"]
    config = LoraConfig(target_modules=names, exclude_modules={"b", "a"})
    names.append("v_proj")
    assert (config.target_modules, config.exclude_modules) == (("q_proj",), ("a", "b"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 2.0),
        ("r", True),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_alpha", "16"),
        ("target_modules", []),
        ("target_modules", None),
        ("target_modules", ""),
        ("target_modules", [3]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "("),
        ("use_rslora", "true"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 1}),
        ("alpha_pattern", {"q_proj": -1}),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", "1"),
        ("layers_pattern", 3),
        ("modules_to_save", "score"),
        ("task_type", "TOKEN_CLS"),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("base_model_name_or_path", 3),
    ],
)
def test_a_value_that_no_adapter_can_have_is_refused_by_its_field(key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=rf"\b{key} is "):
        LoraConfig(**{key: value}).validate()


def test_layers_cannot_be_chosen_beside_a_regex() -> None:
    with pytest.raises(AdapterError, match="layers_to_transform needs target_modules to be a list"):
        LoraConfig(target_modules=".*q_proj", layers_to_transform=[0]).validate()


UNBUILT = {
    "bias": "all",
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "megatron_config": {"a": 1},
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "use_dora": True,
    "use_qalora": True,
    "init_lora_weights": "pissa",
    "modules_to_save": ["input_layernorm"],
    "lora_dropout": 0.1,
}


@pytest.mark.parametrize("key", UNBUILT)
def test_a_field_that_is_not_built_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        LoraConfig(**{key: UNBUILT[key]}).validate()


def test_every_unbuilt_field_is_in_one_error() -> None:
    with pytest.raises(UnsupportedError) as caught:
        LoraConfig(**UNBUILT).validate()
    assert all(key in str(caught.value) for key in UNBUILT)


@pytest.mark.parametrize("value", [False, "olora", "eva", "loftq", 1])
def test_other_ways_to_start_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="init_lora_weights"):
        LoraConfig(init_lora_weights=value).validate()


@pytest.mark.parametrize(
    "key", [k for k, v in UNBUILT.items() if isinstance(v, dict | list) and k != "modules_to_save"]
)
@pytest.mark.parametrize("empty", [None, {}, []])
def test_an_empty_value_asks_for_nothing(key: str, empty: Any) -> None:
    LoraConfig(**{key: empty}).validate()


def test_dropout_matters_to_training_alone() -> None:
    LoraConfig(lora_dropout=0.05).validate(training=False)
    with pytest.raises(UnsupportedError, match=r"lora_dropout 0\.05"):
        LoraConfig(lora_dropout=0.05).validate()


@pytest.mark.parametrize(
    ("task_type", "named", "saved"),
    [
        (None, None, ()),
        ("CAUSAL_LM", ["lm_head", "embed_tokens"], ("lm_head", "embed_tokens")),
        ("SEQ_CLS", None, ("score",)),
        ("SEQ_CLS", ["classifier", "score"], ("score",)),
        ("SEQ_CLS", ["embed_tokens"], ("embed_tokens", "score")),
    ],
)
def test_a_classifier_always_saves_its_head(task_type: Any, named: Any, saved: tuple[str, ...]) -> None:
    config = LoraConfig(task_type=task_type, modules_to_save=named)
    config.validate()
    assert config.saved_modules == saved


def test_every_field_is_one_of_peft_0_17() -> None:
    peft = {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "init_lora_weights", "layer_replication", "layers_pattern"),
        *(
            "layers_to_transform",
            "loftq_config",
            "lora_alpha",
            "lora_bias",
            "lora_dropout",
            "megatron_config",
        ),
        *("megatron_core", "modules_to_save", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora"),
        *("use_qalora", "use_rslora"),
    }
    assert {field.name for field in fields(LoraConfig)} == peft
