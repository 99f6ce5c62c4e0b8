"""Checkpoints and adapters between their folders and one APR file, with every bit of every tensor kept.

The small files of a folder (config.json, tokenizer, template) travel as texts under the metadata key `files`.
A model's tensors keep their stored names. An adapter's have the names of the seed's checkpoints:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    lora.0.q_proj.lora_a [R, I]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    lora.0.q_proj.lora_b [O, R]
    base_model.model.score.weight, .bias                              classifier.weight [C, D], .bias [C]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lora.backend import Array
from lora.errors import FileFormatError
from lora.io.apr import AprFile, read_apr, write_apr
from lora.io.atomic import replace_folder, write_atomically
from lora.io.checkpoint import CONFIG, load_weights, open_checkpoint
from lora.io.peft import CONFIG as ADAPTER_CONFIG
from lora.io.peft import METADATA, TENSORS, load_adapter, parse_peft_name, peft_name
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.io.save_checkpoint import COPIED, copy_companions, write_shards
from lora.spec import layout_of, parameter_count, stored_name, tensor_shapes

FILES = "files"
_ADAPTER_FILES = (ADAPTER_CONFIG, METADATA)
_MODEL_FILES = (CONFIG, "lora_head.json", *COPIED)
_HEADS = {"score.weight", "score.bias", "lm_head.weight"}  # which of them there are, the head decides
# the last part of a module -> what it stands in; no family has two modules of one name in a layer
_PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "out_proj"), "linear_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
_FACTORS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
_KINDS = {short: kind for kind, short in _FACTORS.items()}
# APR's name of a size -> config.json's, for files that hold no config.json
_SIZES = {
    "architecture": "model_type",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_DERIVED = "head_dim"  # may be absent: the family says what it is then


def folder_to_apr(folder: Path, path: Path) -> None:
    """Write the checkpoint or the adapter in `folder` as the APR file `path`, whole or not at all.

    Raises:
        LoraError: the folder is neither, or a file of it is not as it must be.
        WriteError: the file could not be written; what was there is unharmed.
    """
    metadata, tensors = _adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else _model(folder)
    with write_atomically(path) as temporary:
        write_apr(temporary, metadata, tensors)


def apr_to_folder(path: Path, folder: Path) -> None:
    """Write what the APR file `path` holds as a folder that Transformers or PEFT loads, whole or not at all.

    A model without a tokenizer inside takes the one that lies beside the file.

    Raises:
        FileFormatError: the file is corrupt, or holds neither a whole model nor an adapter.
        LoraError: its tensors are not those that its configuration describes.
        WriteError: the folder could not be written; what was there is unharmed.
    """
    held = read_apr(path)
    texts = _texts(path, held)
    with replace_folder(folder) as new:
        for name, text in texts.items():
            (new / name).write_bytes(text.encode())
        if ADAPTER_CONFIG in texts:
            layout = held.metadata.get("layout")
            if layout not in ("text", "multimodal"):
                raise FileFormatError(f"{path}: layout: expected text or multimodal, found {layout!r}")
            tensors = {_peft_name(name, layout): array for name, array in held.tensors.items()}
            if len(tensors) != len(held.tensors):
                raise FileFormatError(f"{path}: two tensors are the same one under two names")
            write_tensors(new / TENSORS, tensors, {"format": "pt"})
            load_adapter(new)  # it refuses what is no adapter, before the folder gets its name
            return
        if CONFIG not in texts:
            (new / CONFIG).write_text(json.dumps(_config(path, held), indent=2) + "\n", encoding="utf-8")
        if "tokenizer.json" not in texts:
            copy_companions(path.parent, new)
        write_shards(new, held.tensors)
        checkpoint = open_checkpoint(new)
        load_weights(checkpoint, tensor_shapes(checkpoint.spec), _HEADS)


def _model(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    checkpoint = open_checkpoint(folder)
    load_weights(checkpoint, tensor_shapes(checkpoint.spec), _HEADS)
    spec, layout = checkpoint.spec, checkpoint.layout
    stored = {stored_name(name, layout): array for name, array in checkpoint.tensors.items()}
    sizes = {short: getattr(spec, key) for short, key in _SIZES.items() if key != "model_type"}
    metadata = {
        **sizes,
        "model_type": "language_model",
        "architecture": spec.family,
        "rope_type": 2,  # dimension j pairs with j + half
        "param_count": parameter_count(spec),
        FILES: _read_texts(folder, _MODEL_FILES),
    }
    return metadata, stored | dict(checkpoint.skipped)


def _adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    config, loaded, _ = load_adapter(folder)
    layout = layout_of(name.removeprefix("base_model.model.") for name in loaded)
    stored = read_tensors(folder / TENSORS)
    metadata = {
        "__checkpoint__.schema_version": "1.3.0",
        "model_type": "adapter",
        "adapter_type": "lora",
        "lora_rank": config.r,
        "lora_alpha": config.alpha,
        "base_model_source": config.base_model_name_or_path,
        "classifier_layout": "[num_classes, hidden_size]",
        "layout": layout,
        FILES: _read_texts(folder, _ADAPTER_FILES),
    }
    return metadata, {_short_name(name, layout): array for name, array in stored.items()}


def _short_name(name: str, layout: str) -> str:
    module, kind = parse_peft_name(name, layout)
    if module == "score":
        return f"classifier.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+)", module)
    if found and kind in _FACTORS and _PARENTS.get(found[3]) == found[2]:
        return f"lora.{found[1]}.{found[3]}.{_FACTORS[kind]}"
    return name


def _peft_name(short: str, layout: str) -> str:
    if found := re.fullmatch(r"classifier\.(weight|bias)", short):
        return peft_name("score", found[1])
    found = re.fullmatch(r"lora\.(\d+)\.(\w+)\.(lora_[ab])", short)
    if found and found[2] in _PARENTS:
        module = f"model.layers.{found[1]}.{_PARENTS[found[2]]}.{found[2]}"
        return peft_name(module, _KINDS[found[3]], layout)
    return short


def _read_texts(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    try:
        return {path.name: path.read_bytes().decode() for path in sorted(paths)}
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{folder}: a configuration or tokenizer file is not UTF-8: {error}") from error


def _texts(path: Path, held: AprFile) -> Mapping[str, str]:
    """Return the small files by name; a name that no such file has could be written anywhere."""
    files = held.metadata.get(FILES) or {}
    known = (*_MODEL_FILES, *_ADAPTER_FILES)
    if not isinstance(files, dict) or not all(
        isinstance(text, str)
        and _is_text(text)
        and re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name)
        and any(fnmatchcase(name, pattern) for pattern in known)
        for name, text in files.items()
    ):
        raise FileFormatError(f"{path}: {FILES}: expected texts by the names of a checkpoint's small files")
    return files


def _is_text(text: str) -> bool:
    # JSON can spell half of a surrogate pair, which no file in UTF-8 can hold
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _config(path: Path, held: AprFile) -> dict[str, Any]:
    given = {key: held.metadata.get(short) for short, key in _SIZES.items()}
    missing = [short for short, key in _SIZES.items() if given[key] is None and short != _DERIVED]
    if missing:
        raise FileFormatError(f"{path}: no model of a known form: the metadata lacks {', '.join(missing)}")
    given["tie_word_embeddings"] = "lm_head.weight" not in held.tensors
    return {key: value for key, value in given.items() if value is not None}
