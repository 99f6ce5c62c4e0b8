"""One spelling of config.json out of the many that hub files use."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

# Transformers renamed the layer types; files written before keep the old names
_LAYER_TYPES = {"attention": "full_attention", "mamba": "linear_attention"}
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def one_spelling(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return `config` flat: the text model's keys, those of its rotation beside them, no null, no old name.

    Two spellings that contradict each other are reported in `problems`.
    """
    flat = _text_settings(config, problems)
    _flatten_rope(flat, problems)
    if isinstance(flat.get("layer_types"), list):
        # str(): an entry may be anything at all, and only names can be old names
        flat["layer_types"] = [_LAYER_TYPES.get(str(kind), kind) for kind in flat["layer_types"]]
    return {key: value for key, value in flat.items() if value is not None}


def _text_settings(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the settings of the language model, whether they stand alone or inside a multimodal file."""
    text = config.get("text_config")
    if text is None:
        return dict(config)
    if not isinstance(text, Mapping):
        problems.append(f"text_config: expected an object, found {reprlib.repr(text)}")
        return dict(config)
    # the outer class owns the head and the stored form of the weights, so its word goes first
    outer = ("tie_word_embeddings", "quantization_config")
    return {**text, **{key: config[key] for key in outer if config.get(key) is not None}}


def _flatten_rope(flat: dict[str, Any], problems: list[str]) -> None:
    """Move what rope_parameters (or rope_scaling, its older name) says to the top of `flat`."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = flat.pop(name, None)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            problems.append(f"{name}: expected an object, found {reprlib.repr(rope)}")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"{name}: rope type {reprlib.repr(kind)} is not built; only 'default' is")
        nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            problems.append(f"{name}: one rotation per layer type ({', '.join(nested)}) is not built")
        for key in _ROPE_KEYS:
            _agree(flat, key, rope.get(key), f"{name}.{key}", problems)


def _agree(flat: dict[str, Any], key: str, value: Any, spelled: str, problems: list[str]) -> None:
    if value is None:
        return
    if flat.get(key) is not None and flat[key] != value:
        found = f"{key} is {reprlib.repr(flat[key])} and {spelled} is {reprlib.repr(value)}"
        problems.append(f"{found}: one of them is wrong")
    flat[key] = value
