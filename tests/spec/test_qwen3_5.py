"""Attempts to falsify contracts/model-families/qwen3_5.yaml."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora import spec
from lora.contracts import family_contract
from lora.errors import ContractError
from lora.spec import spelling
from tests.harness.claims import assert_killed, claimed, planted
from tests.spec import configs
from tests.spec.edits import ROOM, changed, edited, refusal, with_sizes, with_tensors

CONTRACT = family_contract("qwen3_5")
REQUIRED = [
    *(
        k
        for k in CONTRACT.sizes["9b"].config
        if k not in CONTRACT.defaults and k != "full_attention_interval"
    ),
    "layer_types",
]
NINE = ("9B", "9b", "qwen3.5-9b", "Qwen3.5-9B", "qwen3.5", "qwen3_5")
BROKEN = (
    ({"num_attention_heads": 7, "num_key_value_heads": 2}, ("num_attention_heads", "num_key_value_heads")),
    (
        {"linear_num_value_heads": 5, "linear_num_key_heads": 2},
        ("linear_num_value_heads", "linear_num_key_heads"),
    ),
    ({"head_dim": 12}, ("rotary_dim",)),
    ({"partial_rotary_factor": 1.5}, ("partial_rotary_factor",)),
    ({"num_hidden_layers": 1025}, ("num_hidden_layers", "layer_types")),
    ({"layer_types": ["full_attention"] * 7}, ("layer_types", "num_hidden_layers")),
    ({"attn_output_gate": False}, ("attn_output_gate",)),
    ({"attention_bias": True, "hidden_act": "gelu"}, ("attention_bias", "hidden_act")),
)


class Case(NamedTuple):
    size: str
    alias: str
    record: dict[str, Any]
    config: configs.Config
    broken: tuple[dict[str, Any], tuple[str, ...]]
    missing: str


CASES = st.builds(
    Case,
    st.sampled_from(sorted(CONTRACT.sizes)),
    st.sampled_from(NINE),
    st.sampled_from(configs.shaped("qwen3_5")),
    configs.qwen3_5(),
    st.sampled_from(BROKEN),
    st.sampled_from(REQUIRED),
)


def _canonical_shapes(room: Any, stored: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    read = {name: tuple(shape) for name, shape in stored.items() if not room.is_skipped(name, "qwen3_5")}
    layout = room.layout_of(read)
    return {room.canonical_name(name, layout): shape for name, shape in read.items()}


def check_vocabulary(room: Any, case: Case) -> None:
    assert room.size_spec(case.alias).vocab_size == 248320


def check_no_bias(room: Any, case: Case) -> None:
    nine = room.size_spec(case.alias)
    assert not nine.qkv_bias
    assert not [name for name in room.tensor_shapes(nine) if name.endswith(".bias")]


def check_head_dim(room: Any, case: Case) -> None:
    assert room.size_spec(case.alias).head_dim == 256
    assert room.read_spec(case.config).head_dim == case.config["head_dim"]


def check_layers(room: Any, case: Case) -> None:
    assert room.size_spec(case.alias).num_hidden_layers == 32


def check_key_value_heads(room: Any, case: Case) -> None:
    assert room.size_spec(case.alias).num_key_value_heads == 4


def check_dimensions(room: Any, case: Case) -> None:
    found = asdict(room.size_spec(case.size))
    stated = CONTRACT.sizes[case.size].config
    derived = ("partial_rotary_factor", "full_attention_interval")
    assert {key: found[key] for key in stated if key not in derived} == {
        key: value for key, value in stated.items() if key not in derived
    }
    nine = room.size_spec("9b")
    assert (nine.hidden_size, nine.intermediate_size, nine.num_attention_heads) == (4096, 12288, 16)


def check_aliases(room: Any, case: Case) -> None:
    assert room.size_spec(case.alias).hidden_size == 4096
    assert room.size_spec(case.alias).family == "qwen3_5"
    entries = [s for f in ("qwen2", "qwen3_5") for s in family_contract(f).sizes.items()]
    assert len(room.size_names()) == sum(1 + len(size.aliases) for _, size in entries)


def check_counts(room: Any, case: Case) -> None:
    count = room.parameter_count(room.size_spec(case.size))
    assert count == CONTRACT.sizes[case.size].parameters == configs.sized("qwen3_5")[case.size]["parameters"]


def check_tensors(room: Any, case: Case) -> None:
    shapes = room.tensor_shapes(room.read_spec(case.record["config"]))
    assert shapes == _canonical_shapes(ROOM, case.record["tensors"])


def check_gate(room: Any, case: Case) -> None:
    found = room.size_spec(case.size)
    rows = {
        int(name.split(".")[2]): shape[0]
        for name, shape in room.tensor_shapes(found).items()
        if name.endswith("q_proj.weight")
    }
    layers = found.num_hidden_layers
    assert rows == dict.fromkeys(range(3, layers, 4), 2 * found.num_attention_heads * found.head_dim)
    assert found.attn_output_gate


def check_rotation(room: Any, case: Case) -> None:
    found = room.size_spec(case.size)
    assert (found.rotary_dim, found.head_dim, found.rope_theta) == (64, 256, 1e7)


def check_norms(room: Any, case: Case) -> None:
    found = room.size_spec(case.size)
    assert found.qk_norm
    assert found.zero_centred_norm
    names = {name for name in room.tensor_shapes(found) if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert len(names) == 2 * found.layer_types.count("full_attention")


def check_pattern(room: Any, case: Case) -> None:
    for found in (room.size_spec(case.size), room.read_spec(_by_list(case.size))):
        full = [i for i, kind in enumerate(found.layer_types) if kind == "full_attention"]
        assert full == list(range(3, found.num_hidden_layers, 4))
        assert set(found.layer_types) == {"full_attention", "linear_attention"}


def _by_list(size: str) -> configs.Config:
    config = {"model_type": "qwen3_5_text", **CONTRACT.sizes[size].config}
    del config["full_attention_interval"]
    pattern = ["linear_attention"] * 3 + ["full_attention"]
    return config | {"layer_types": pattern * (config["num_hidden_layers"] // 4)}


def check_spellings(room: Any, case: Case) -> None:
    flat = case.config
    expected = spec.read_spec(flat)
    rope = {"rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    old_names = {"full_attention": "attention", "linear_attention": "mamba"}
    without = {k: v for k, v in flat.items() if k not in ("rope_theta", "partial_rotary_factor")}
    in_rope = rope | {"rope_theta": flat["rope_theta"], "partial_rotary_factor": 0.25}
    spellings = [
        without | {"rope_parameters": in_rope},
        without | {"rope_scaling": in_rope | {"type": "default"}},
        without
        | {"rope_parameters": rope | {"rope_theta": flat["rope_theta"]}, "partial_rotary_factor": 0.25},
        without | {"rope_theta": flat["rope_theta"], "rope_scaling": None},
        flat | {"layer_types": [old_names[kind] for kind in flat["layer_types"]]},
        {
            "model_type": "qwen3_5",
            "tie_word_embeddings": flat["tie_word_embeddings"],
            "text_config": flat,
            "vision_config": {"hidden_size": 5, "num_hidden_layers": 77},
        },
    ]
    for spelled in spellings:
        assert room.read_spec(spelled) == expected


def check_rules(room: Any, case: Case) -> None:
    found = asdict(room.read_spec(case.config))
    assert all(found[key] == case.config[key] for key in CONTRACT.axes.values() if key in case.config)
    assert found["layer_types"] == tuple(case.config["layer_types"])
    values, named = case.broken
    message = refusal(room.read_spec, case.config | values)
    assert all(key in message for key in named)


def check_tied(room: Any, case: Case) -> None:
    tied = case.size in ("0.8b", "4b")
    found = room.size_spec(case.size)
    assert found.tie_word_embeddings == tied
    assert ("lm_head.weight" in room.tensor_shapes(found)) != tied


def check_layouts(room: Any, case: Case) -> None:
    names = list(spec.tensor_shapes(spec.read_spec(case.config)))
    multimodal = [
        name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        for name in names
    ]
    foreign = ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "model.visual.pos_embed.weight"]
    for stored in (names, multimodal):
        read = [name for name in stored + foreign if not room.is_skipped(name, "qwen3_5")]
        layout = room.layout_of(read)
        assert [room.canonical_name(name, layout) for name in read] == names
        assert [room.stored_name(name, layout) for name in names] == stored
    # a name of the one layout inside the other must not pass for what it looks like
    assert room.canonical_name("model.norm.weight", "multimodal") not in names


def check_missing(room: Any, case: Case) -> None:
    for key in {case.missing, "rope_theta"}:
        config = {k: v for k, v in case.config.items() if k != key}
        assert f"{key} is missing" in refusal(room.read_spec, config)


CHECKS = {
    "FALSIFY-FT-QWEN35-001": check_vocabulary,
    "FALSIFY-FT-QWEN35-002": check_no_bias,
    "FALSIFY-FT-QWEN35-003": check_head_dim,
    "FALSIFY-FT-QWEN35-004": check_layers,
    "FALSIFY-FT-QWEN35-005": check_key_value_heads,
    "FALSIFY-FT-QWEN35-006": check_dimensions,
    "FALSIFY-FT-QWEN35-007": check_aliases,
    "QWEN35-001": check_counts,
    "QWEN35-002": check_tensors,
    "QWEN35-003": check_gate,
    "QWEN35-004": check_rotation,
    "QWEN35-005": check_norms,
    "QWEN35-006": check_pattern,
    "QWEN35-007": check_spellings,
    "QWEN35-008": check_rules,
    "QWEN35-009": check_tied,
    "QWEN35-010": check_layouts,
    "QWEN35-011": check_missing,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(ROOM, case)


ATTENTION = "model.layers.{i}.self_attn."
Q_PROJ = f"{ATTENTION}q_proj.weight"
NORMS = {f"{ATTENTION}q_norm.weight": None, f"{ATTENTION}k_norm.weight": None}


def _one_block_short(s: Any) -> Any:
    return {
        name: shape for name, shape in spec.tensor_shapes(s).items() if not name.startswith("model.layers.0.")
    }


def _known_sizes_only(config: Any) -> Any:
    found = spec.read_spec(config)
    if found.hidden_size not in {spec.size_spec(size).hidden_size for size in CONTRACT.sizes}:
        raise ContractError("not a published size")
    return found


def _head_dim_from_hidden_size(config: Any) -> Any:
    return replace(spec.read_spec(config), head_dim=config["hidden_size"] // config["num_attention_heads"])


def _shifted(name: str) -> Any:
    found = spec.size_spec(name)
    return replace(found, layer_types=(*found.layer_types[1:], found.layer_types[0]))


def _no_old_layer_names(config: Any) -> Any:
    with patch.object(spelling, "_LAYER_TYPES", {}):
        return spec.read_spec(config)


def _no_old_rotary_factor(config: Any) -> Any:
    with patch.object(spelling, "_ROPE_KEYS", ("rope_theta",)):
        return spec.read_spec({k: v for k, v in config.items() if k != "partial_rotary_factor"} | WHOLE)


def _sizes(**changes: Any) -> Any:
    return with_sizes(CONTRACT, lambda config: config | changes)


WHOLE = {"partial_rotary_factor": 1.0}
MUTANTS = {
    "qwen2_behind_the_alias": changed(size_spec=lambda name: spec.size_spec("14b")),
    "biased_qkv": with_tensors(
        CONTRACT,
        "full_attention",
        {f"{ATTENTION}q_proj.bias": ["2 * H * E"]},
        facts={**CONTRACT.facts, "qkv_bias": True},
    ),
    "head_dim_from_hidden_size": changed(read_spec=_head_dim_from_hidden_size),
    "swapped_widths": with_sizes(
        CONTRACT, lambda c: c | {"hidden_size": c["intermediate_size"], "intermediate_size": c["hidden_size"]}
    ),
    "tied_head": _sizes(tie_word_embeddings=True),
    "untied_head": _sizes(tie_word_embeddings=False),
    "ungated_q_proj": with_tensors(CONTRACT, "full_attention", {Q_PROJ: ["H * E", "D"]}),
    "q_proj_in_delta_layers": with_tensors(CONTRACT, "linear_attention", {Q_PROJ: ["2 * H * E", "D"]}),
    "one_block_short": changed(tensor_shapes=_one_block_short),
    "all_full_attention": _sizes(full_attention_interval=1),
    "no_qk_norms": with_tensors(
        CONTRACT, "full_attention", NORMS, facts={**CONTRACT.facts, "qk_norm": False}
    ),
    "whole_head_rotated": _sizes(**WHOLE),
    "theta_1e6": _sizes(rope_theta=1e6),
    "plain_norms": edited(CONTRACT, facts={**CONTRACT.facts, "zero_centred_norm": False}),
    "shifted_pattern": changed(size_spec=_shifted),
    "outer_config_only": changed(read_spec=lambda c: spec.read_spec({**c, "text_config": None})),
    "no_old_layer_names": changed(read_spec=_no_old_layer_names),
    "no_old_rotary_factor": changed(read_spec=_no_old_rotary_factor),
    "no_rules": edited(CONTRACT, rules=()),
    "known_sizes_only": changed(read_spec=_known_sizes_only),
    "text_layout_only": edited(CONTRACT, layouts={"text": "model."}),
    "reads_mtp": edited(CONTRACT, skipped=("model.visual.",)),
    "guesses_theta": changed(read_spec=lambda config: spec.read_spec({"rope_theta": 1e4, **config})),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
