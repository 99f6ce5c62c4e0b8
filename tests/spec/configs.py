"""Configs to read: random ones that keep a family's rules, and those that Transformers was asked about."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Config = dict[str, Any]


@cache
def records(family: str) -> tuple[dict[str, Any], ...]:
    """Return what Transformers said of `family`: {config, parameters} with `size` or `tensors`."""
    lines = (Path(__file__).parent / "transformers_shapes.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(entry for line in lines if (entry := json.loads(line))["family"] == family)


def sized(family: str) -> dict[str, dict[str, Any]]:
    """Return the records of the published sizes, by size."""
    return {entry["size"]: entry for entry in records(family) if "size" in entry}


def shaped(family: str) -> list[dict[str, Any]]:
    """Return the records that list tensors."""
    return [entry for entry in records(family) if "tensors" in entry]


@st.composite
def common(draw: st.DrawFn) -> Config:
    """What every family's config holds, with sizes that keep every rule."""
    groups, share = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return {
        "hidden_size": draw(st.integers(1, 64)),
        "intermediate_size": draw(st.integers(1, 96)),
        "vocab_size": draw(st.integers(1, 200)),
        "num_hidden_layers": draw(st.integers(1, 6)),
        "num_attention_heads": groups * share,
        "num_key_value_heads": groups,
        "head_dim": 8 * draw(st.integers(1, 4)),
        "max_position_embeddings": draw(st.integers(1, 1 << 18)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_theta": draw(st.sampled_from([1e4, 1000000, 1e7])),
        "tie_word_embeddings": draw(st.booleans()),
        "eos_token_id": draw(st.sampled_from([None, 3, [3, 5]])),
        "hidden_act": "silu",
    }


@st.composite
def qwen2(draw: st.DrawFn) -> Config:
    """A config.json of family qwen2."""
    return {"model_type": "qwen2", **draw(common())}


@st.composite
def qwen3_5(draw: st.DrawFn) -> Config:
    """A config.json of family qwen3_5, flat, with a layer pattern of its own."""
    config, key_heads = draw(common()), draw(st.integers(1, 3))
    layers = config["num_hidden_layers"]
    kinds = st.sampled_from(["full_attention", "linear_attention"])
    return {
        "model_type": "qwen3_5_text",
        **config,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(st.integers(1, 9)),
        "linear_value_head_dim": draw(st.integers(1, 9)),
        "linear_conv_kernel_dim": draw(st.integers(1, 5)),
        "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
    }
