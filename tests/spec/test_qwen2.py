"""Attempts to falsify contracts/model-families/qwen2.yaml."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora import spec
from lora.contracts import family_contract
from lora.errors import ContractError
from tests.harness.claims import assert_killed, claimed, planted
from tests.spec import configs
from tests.spec.edits import ROOM, changed, edited, refusal, with_tensors

CONTRACT = family_contract("qwen2")
REQUIRED = (
    "rope_theta",
    *(k for k in CONTRACT.sizes["0.5b"].config if k not in CONTRACT.defaults and k != "rope_theta"),
)
# (what is put into a good config, the keys that the refusal must name)
BROKEN = (
    ({"num_attention_heads": 7, "num_key_value_heads": 2}, ("num_attention_heads", "num_key_value_heads")),
    ({"head_dim": 7}, ("rotary_dim",)),
    ({"partial_rotary_factor": 0.5}, ("rotary_dim", "head_dim")),
    ({"num_hidden_layers": 1025}, ("num_hidden_layers",)),
    (
        {"head_dim": 9, "num_attention_heads": 3, "num_key_value_heads": 2},
        ("rotary_dim", "num_attention_heads"),
    ),
)


class Case(NamedTuple):
    size: str
    record: dict[str, Any]
    config: configs.Config
    broken: tuple[dict[str, Any], tuple[str, ...]]
    missing: str
    differing: frozenset[str]


DIFFERENT = {
    "hidden_size": 7,
    "num_hidden_layers": 2,
    "vocab_size": 11,
    "rope_theta": 1e4,
    "tie_word_embeddings": None,  # the other one
    "intermediate_size": 5,
}
CASES = st.builds(
    Case,
    st.sampled_from(sorted(CONTRACT.sizes)),
    st.sampled_from(configs.shaped("qwen2")),
    configs.qwen2(),
    st.sampled_from(BROKEN),
    st.sampled_from(REQUIRED),
    st.frozensets(st.sampled_from(sorted(DIFFERENT)), min_size=1),
)


def check_counts(room: Any, case: Case) -> None:
    count = room.parameter_count(room.size_spec(case.size))
    assert count == CONTRACT.sizes[case.size].parameters == configs.sized("qwen2")[case.size]["parameters"]
    count = room.parameter_count(room.read_spec(case.record["config"]))
    assert count == case.record["parameters"]


def check_tensors(room: Any, case: Case) -> None:
    shapes = room.tensor_shapes(room.read_spec(case.record["config"]))
    assert shapes == {name: tuple(shape) for name, shape in case.record["tensors"].items()}


def check_rules(room: Any, case: Case) -> None:
    found = asdict(room.read_spec(case.config))
    assert {key: found[key] for key in CONTRACT.axes.values() if key in case.config} == {
        key: case.config[key] for key in CONTRACT.axes.values() if key in case.config
    }
    values, named = case.broken
    message = refusal(room.read_spec, case.config | values)
    assert all(key in message for key in named)


def check_named_size(room: Any, case: Case) -> None:
    named = spec.size_spec(case.size)
    room.check_named_size(replace(named, rms_norm_eps=1e-5, eos_token_ids=(7,)), case.size)
    changes = {key: DIFFERENT[key] for key in case.differing}
    if "tie_word_embeddings" in changes:
        changes["tie_word_embeddings"] = not named.tie_word_embeddings
    message = refusal(room.check_named_size, replace(named, **changes), case.size)
    assert set(re.findall(r"(\w+) is \S+, expected", message)) == case.differing


def check_missing(room: Any, case: Case) -> None:
    for key in {case.missing, "rope_theta"}:
        config = {k: v for k, v in case.config.items() if k != key}
        assert f"{key} is missing" in refusal(room.read_spec, config)


CHECKS = {
    "QWEN2-001": check_counts,
    "QWEN2-002": check_tensors,
    "QWEN2-003": check_rules,
    "QWEN2-004": check_named_size,
    "QWEN2-005": check_missing,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(ROOM, case)


def _one_block_short(s: Any) -> Any:
    last = f"model.layers.{s.num_hidden_layers - 1}."
    return {name: shape for name, shape in spec.tensor_shapes(s).items() if not name.startswith(last)}


def _blind_to(key: str) -> Any:
    def check(found: Any, name: str) -> None:
        spec.check_named_size(replace(found, **{key: getattr(spec.size_spec(name), key)}), name)

    return changed(check_named_size=check)


def _first_difference_only(found: Any, name: str) -> None:
    try:
        spec.check_named_size(found, name)
    except ContractError as error:
        raise ContractError(str(error).partition("; ")[0]) from error


def _known_sizes_only(config: Any) -> Any:
    found = spec.read_spec(config)
    if found.hidden_size not in {spec.size_spec(size).hidden_size for size in CONTRACT.sizes}:
        raise ContractError("not a published size")
    return found


BIASES = {name: None for name in CONTRACT.tensors["full_attention"] if name.endswith(".bias")}
MUTANTS = {
    "untied_head": changed(tensor_shapes=lambda s: spec.tensor_shapes(replace(s, tie_word_embeddings=False))),
    "missing_qkv_bias": with_tensors(CONTRACT, "full_attention", BIASES),
    "one_block_short": changed(tensor_shapes=_one_block_short),
    "extra_tensor": with_tensors(CONTRACT, "layer", {"model.layers.{i}.mlp.norm.weight": ["D"]}),
    "transposed_o_proj": with_tensors(
        CONTRACT, "full_attention", {"model.layers.{i}.self_attn.o_proj.weight": ["H * E", "D"]}
    ),
    "no_rules": edited(CONTRACT, rules=()),
    "known_sizes_only": changed(read_spec=_known_sizes_only),
    "first_difference_only": changed(check_named_size=_first_difference_only),
    "blind_to_theta": _blind_to("rope_theta"),
    "blind_to_tie": _blind_to("tie_word_embeddings"),
    "guesses_theta": changed(read_spec=lambda config: spec.read_spec({"rope_theta": 1e4, **config})),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
