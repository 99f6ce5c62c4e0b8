"""Published sizes by name."""

from __future__ import annotations

import pytest

from lora import spec
from lora.errors import ContractError, UsageError


@pytest.mark.parametrize(
    ("name", "family", "size"),
    [
        ("0.5B", "qwen2", "0.5b"),
        ("500M", "qwen2", "0.5b"),
        ("Qwen2-0.5b", "qwen2", "0.5b"),
        ("27B", "qwen3_5", "27b"),
    ],
)
def test_a_name_in_any_case(name: str, family: str, size: str) -> None:
    assert spec.size_names()[name.lower()] == (family, size)
    assert spec.size_spec(name) == spec.size_spec(size)


def test_an_unknown_size_is_refused_by_the_ones_there_are() -> None:
    with pytest.raises(UsageError, match=r"'13B'.*0\.5b.*32b.*9b"):
        spec.size_spec("13B")


def test_every_size_names_a_checkpoint_of_the_hub() -> None:
    assert spec.size_hub("0.5B") == "Qwen/Qwen2.5-Coder-0.5B"
    assert all("/" in spec.size_hub(size) for _, size in spec.size_names().values())


def test_a_layer_pattern_that_differs_is_named_without_listing_it() -> None:
    with pytest.raises(
        ContractError, match="layer_types has 24 entries, expected 32, and differs from entry 24 on"
    ):
        spec.check_named_size(spec.size_spec("0.8b"), "9b")


def test_adapters_sit_beside_the_linear_modules_of_the_layers_alone() -> None:
    modules = spec.adaptable_modules(spec.size_spec("9b"))
    assert modules["model.layers.3.self_attn.q_proj"] == (8192, 4096)
    assert modules["model.layers.0.linear_attn.in_proj_qkv"] == (8192, 4096)
    assert {name.rpartition(".")[2] for name in modules} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    }
