"""PEFT's adapter folder, both ways: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module in the base's own class>.lora_A.weight [R, I]    .lora_B.weight [O, R]    float32

What PEFT has no place for (class names, pooling, the base's hash) goes into lora_metadata.json beside them.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import Array, bfloat16, to_host
from lora.errors import AdapterError, MissingFileError, UnsupportedError
from lora.io.adapter_names import PREFIX, parse_peft_name, peft_name
from lora.io.apr_contents import adapter_tensors, write_adapter
from lora.io.apr_folder import AprFolder, AprText, Folder, is_apr
from lora.io.atomic import replace_folder
from lora.io.checkpoint import read_json_object
from lora.io.lora_config import LoraConfig
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.io.small_files import ADAPTER_CONFIG as CONFIG
from lora.io.small_files import ADAPTER_METADATA as METADATA
from lora.io.targets import SHORTHANDS
from lora.spec import layout_of

TENSORS = "adapter_model.safetensors"
_WIDENED = (np.dtype("float16"), bfloat16, np.dtype("float32"))
# where our own default differs from what a key that is absent from a file means
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None, "init_lora_weights": True}
_READ_ONLY_KEYS = ("peft_type", "peft_version", "inference_mode")


def in_layout(tensors: Mapping[str, Array], layout: str) -> dict[str, Array]:
    """Return `tensors` by the names that they have beside a base of `layout`, whatever they are named for.

    Raises:
        AdapterError: a name is no adapter's.
    """
    found = layout_of(name.removeprefix(PREFIX) for name in tensors)
    return {peft_name(*parse_peft_name(name, found), layout): array for name, array in tensors.items()}


def check_tensors(tensors: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare an adapter's tensors with those that a model needs; both by name on disk.

    PEFT itself only warns here, and an adapter whose names do not match then changes nothing.

    Raises:
        AdapterError: tensors are missing, unexpected or misshapen; one error lists every one.
    """
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise AdapterError("the adapter does not fit the model: " + "; ".join(problems))


def save_adapter(
    path: Path, config: LoraConfig, tensors: Mapping[str, Array], metadata: Mapping[str, Any]
) -> None:
    """Write the adapter folder, or under a name that ends in .apr one APR file, whole or not at all.

    Files in the folder that are not an adapter's are kept.

    Args:
        path: where to write.
        config: with its targets spelled out (`expanded`).
        tensors: float32, by name on disk.
        metadata: JSON values for lora_metadata.json.

    Raises:
        AdapterError: a tensor is not float32 or not finite, a name is no adapter's, or a shorthand is left.
        UnsupportedError: the config holds what is not built.
        WriteError: `path` could not be written; what was there is unharmed.
    """
    config.validate(training=False)
    if config.target_modules in SHORTHANDS:
        raise AdapterError(f"target_modules {config.target_modules!r} must be expanded before it is written")
    tensors = {name: to_host(array) for name, array in tensors.items()}
    _check_writable(tensors)
    facts = {CONFIG: _to_json(config)} | ({METADATA: dict(metadata)} if metadata else {})
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in facts.items()}
    if is_apr(path):
        write_adapter(path, config, texts, tensors)
        return
    with replace_folder(path, owns=("adapter_*", METADATA)) as new:
        write_tensors(new / TENSORS, tensors, {"format": "pt"})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")


def load_adapter(folder: Folder) -> tuple[LoraConfig, dict[str, Array], dict[str, Any]]:
    """Return (config, tensors, metadata) of an adapter; tensors are float32, by PEFT's names.

    bfloat16 and float16 are widened. Keys that adapter_config.json lacks have PEFT's defaults.

    Raises:
        MissingFileError: the folder, or one of its two files, does not exist.
        FileFormatError: a file is truncated or corrupt.
        AdapterError: the config or a tensor is none that an adapter can have.
        UnsupportedError: the config holds what is not built.
    """
    for name in (CONFIG,) if isinstance(folder, AprFolder) else (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise MissingFileError(
                f"{folder}: expected a folder with {CONFIG} and {TENSORS}; {name} is missing"
            )
    config = _from_json(read_json_object(folder / CONFIG), folder / CONFIG)
    config.validate(training=False)
    stored = adapter_tensors(folder) if isinstance(folder, AprFolder) else read_tensors(folder / TENSORS)
    tensors = {name: _widened(name, array) for name, array in stored.items()}
    _check_writable(tensors)
    path = folder / METADATA
    return config, tensors, read_json_object(path) if path.is_file() else {}


def _widened(name: str, array: Array) -> Array:
    if array.dtype not in _WIDENED:
        raise AdapterError(f"{name} is {array.dtype}, expected float32, bfloat16 or float16")
    # a copy in either case: the optimizer writes to it, and the file may be replaced while the model lives
    return array.astype(np.float32)


def _check_writable(tensors: Mapping[str, Array]) -> None:
    if not tensors:
        raise AdapterError("the adapter holds no tensor")
    for name, array in tensors.items():
        parse_peft_name(name)
        if array.dtype != np.float32:
            raise AdapterError(f"{name} is {array.dtype}, expected float32")
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise AdapterError(f"values that are not finite in {', '.join(broken)}")


def _to_json(config: LoraConfig) -> dict[str, Any]:
    values = asdict(config) | {"lora_alpha": config.alpha, "inference_mode": True, "peft_type": "LORA"}
    if config.task_type == "SEQ_CLS":
        values["modules_to_save"] = sorted({"classifier", *config.saved_modules})
    # sorted at the top only: of the patterns, the first that matches counts
    return dict(sorted(values.items()))


def _from_json(values: Mapping[str, Any], path: Path | AprText) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {values.get('peft_type')!r}; only 'LORA' is built")
    known = {f.name for f in fields(LoraConfig)}
    # later versions of PEFT add switches, each off by default
    unknown = [k for k, value in values.items() if k not in known and k not in _READ_ONLY_KEYS and value]
    if unknown:
        raise UnsupportedError(f"{path}: not built here: {', '.join(f'{k} {values[k]!r}' for k in unknown)}")
    given = {k: value for k, value in values.items() if k in known}
    if given.get("lora_alpha", 0) is None:
        raise AdapterError(f"{path}: lora_alpha is null, expected a number; only an absent key has a default")
    for key in ("rank_pattern", "alpha_pattern"):
        given[key] = given.get(key) or {}
    return LoraConfig(**(_PEFT_DEFAULTS | given))
