"""config.json as it comes: contradictory, hostile, or of another world."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora import spec
from lora.errors import ContractError, UnsupportedError
from tests.spec import configs
from tests.spec.edits import refusal

GOOD: configs.Config = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 44,
    "vocab_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
HYBRID: configs.Config = GOOD | {
    "model_type": "qwen3_5",
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
KEYS = [
    *HYBRID,
    "tie_word_embeddings",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "text_config",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "quantization_config",
]


def test_what_a_file_may_leave_out() -> None:
    found = spec.read_spec(GOOD)
    assert (found.head_dim, found.rotary_dim, found.tie_word_embeddings) == (8, 8, False)
    assert (found.eos_token_ids, found.pad_token_id, found.layer_types) == ((), None, ("full_attention",) * 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["sliding_attention"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "yarn"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "llama3"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["one rotation per layer type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config"]),
        ({"rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "10000", "1000000"]),
        ({"layer_types": ["full_attention"] * 2}, ["layer_types", "num_hidden_layers 3"]),
        ({"rope_theta": float("nan"), "rms_norm_eps": -1}, ["rope_theta", "rms_norm_eps"]),
        (
            {"hidden_size": True, "vocab_size": 56.0, "eos_token_id": ["a"]},
            ["hidden_size", "vocab_size", "eos_"],
        ),
        ({"rope_theta": None, "vocab_size": None}, ["rope_theta is missing", "vocab_size is missing"]),
        ({"num_hidden_layers": 10**12, "rope_theta": 10**400}, ["num_hidden_layers", "rope_theta"]),
        ({"head_dim": 10**400, "vocab_size": 2**31}, ["head_dim", "vocab_size"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"hidden_size": 3}, ["head_dim comes out as 0"]),
        ({"partial_rotary_factor": 0.1}, ["rotary_dim comes out as 0"]),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: list[str]) -> None:
    message = refusal(spec.read_spec, GOOD | change)
    assert all(word in message for word in named), message


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", ["qwen2"], {}])
def test_another_family_is_refused_by_the_ones_there_are(model_type: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"Qwen2\.5 \(qwen2\).*Qwen3\.5 \(qwen3_5_text or qwen3_5\)"):
        spec.read_spec(GOOD | {"model_type": model_type})


def test_both_bases_of_the_hostile_files_are_good() -> None:
    assert spec.read_spec(GOOD).family == "qwen2"
    assert spec.read_spec(HYBRID).layer_types == ("linear_attention", "full_attention", "linear_attention")


def test_inactive_keys_of_published_files_are_no_reason_to_refuse() -> None:
    published = {
        "sliding_window": 32768,
        "max_window_layers": 24,
        "use_sliding_window": False,
        "use_mrope": False,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    assert spec.read_spec(GOOD | published).eos_token_ids == (151645,)


def test_the_outer_word_on_the_head_goes_first() -> None:
    text = spec.size_spec("9b")
    config = {"model_type": "qwen3_5_text", **_published("9b")}
    outer = {"model_type": "qwen3_5", "text_config": config, "tie_word_embeddings": True}
    assert spec.read_spec(outer).tie_word_embeddings
    assert not text.tie_word_embeddings


def test_an_interval_that_contradicts_the_list_is_refused() -> None:
    config = {"model_type": "qwen3_5_text", **_published("9b"), "layer_types": ["linear_attention"] * 32}
    assert "layer_types contradicts full_attention_interval 4" in refusal(spec.read_spec, config)


def _published(size: str) -> configs.Config:
    from lora.contracts import family_contract

    return dict(family_contract("qwen3_5").sizes[size].config)


@given(
    st.sampled_from([GOOD, HYBRID]),
    st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(0, 9) | st.floats(0, 1), max_size=3),
)
def test_a_hostile_file_is_read_or_refused(good: configs.Config, changes: dict[str, Any]) -> None:
    try:
        found = spec.read_spec(good | changes)
    except (ContractError, UnsupportedError) as error:
        assert len(str(error)) < 5000  # noqa: PT017 - the message must stay readable, whatever the file holds
        return
    # what is read is a model: it has tensors, and every one a shape
    assert all(size > 0 for shape in spec.tensor_shapes(found).values() for size in shape)
    assert spec.adaptable_modules(found)
