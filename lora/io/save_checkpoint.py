"""Writing a model's folder as Transformers lays it out, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import Array
from lora.io.atomic import replace_folder
from lora.io.checkpoint import CONFIG, INDEX, SINGLE, open_checkpoint
from lora.io.safetensors_file import Deferred, tensor_bytes, write_tensors
from lora.spec import stored_name

Tensor = Array | Deferred

SHARD_BYTES = 5 * 10**9
# what a tokenizer, a chat template, a processor and a generation setting are stored as
COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)
_OWNED = (CONFIG, INDEX, "model*.safetensors", *COPIED)
_METADATA = {"format": "pt"}  # Transformers refuses a file that does not say so


def save_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source_folder: Path | None = None,
    dtypes: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that Transformers loads. A `folder` that exists is replaced; foreign files are kept.

    Args:
        folder: where to write.
        weights: by canonical name, arrays or `Deferred` ones.
        config: the content of config.json.
        source_folder: the checkpoint that the model came from. Its layout is kept, its tokenizer, template
            and generation files are copied, and so are, byte for byte, the tensors that are not read here.
        dtypes: the dtype on disk by canonical name; a name without one keeps its array's.
        texts: further files of the folder, by name.
        shard_bytes: more than this many bytes of tensors go into several files.

    Raises:
        WriteError: the folder could not be written; what was there is unharmed.
        LoadError: `source_folder` is no checkpoint.
    """
    source = None if source_folder is None else open_checkpoint(source_folder)
    layout = "text" if source is None else source.layout
    tensors = {stored_name(k, layout): _as_stored(w, (dtypes or {}).get(k)) for k, w in weights.items()}
    if source is not None:
        tensors |= source.skipped
    with replace_folder(folder, owns=_OWNED) as new:
        _write_json(new / CONFIG, config)
        write_shards(new, tensors, shard_bytes)
        if source is not None:
            copy_companions(source.folder, new)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, template and generation files of the checkpoint folder `source` to `target`."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _as_stored(tensor: Tensor, dtype: Any) -> Tensor:
    if dtype is None or np.dtype(tensor.dtype) == np.dtype(dtype):
        return tensor
    make = tensor.make if isinstance(tensor, Deferred) else lambda: tensor
    return Deferred(tuple(tensor.shape), np.dtype(dtype), make)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors`, by stored name, in one file, or in several and their index above `shard_bytes`."""
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / SINGLE, tensors, _METADATA)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names}, _METADATA)
        where |= dict.fromkeys(names, file)
    total = sum(tensor_bytes(tensor) for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Return the names for each file, in order; a tensor larger than `shard_bytes` has a file to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
