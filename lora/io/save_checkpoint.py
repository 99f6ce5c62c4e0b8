"""Writing a model as Transformers lays out its folder, or as one APR file, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from lora.io.apr_contents import write_model
from lora.io.apr_folder import Folder, is_apr
from lora.io.atomic import replace_folder
from lora.io.checkpoint import CONFIG, INDEX, SINGLE, open_checkpoint
from lora.io.safetensors_file import Deferred, Tensor, tensor_bytes, write_tensors
from lora.io.small_files import COMPANIONS, HEAD_FILE, decoded, matching
from lora.spec import stored_name

SHARD_BYTES = 5 * 10**9
_OWNED = (CONFIG, HEAD_FILE, INDEX, "model*.safetensors", *COMPANIONS)
_METADATA = {"format": "pt"}  # Transformers refuses a file that does not say so


def save_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    source_folder: Folder | None = None,
    dtypes: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that Transformers loads, or under a name that ends in .apr one APR file.

    A folder that exists is replaced; foreign files in it are kept.

    Args:
        path: where to write.
        weights: by canonical name, arrays or `Deferred` ones.
        config: the content of config.json.
        source_folder: the checkpoint that the model came from. Its layout is kept, its tokenizer, template
            and generation files are copied, and so are, byte for byte, the tensors that are not read here.
        dtypes: the dtype on disk by canonical name; a name without one keeps its array's.
        texts: further small files, by name.
        shard_bytes: more than this many bytes of tensors go into several files; an APR file is always one.

    Raises:
        WriteError: `path` could not be written; what was there is unharmed.
        LoadError: `source_folder` is no checkpoint.
    """
    source = None if source_folder is None else open_checkpoint(source_folder)
    layout = "text" if source is None else source.layout
    tensors = {stored_name(k, layout): _as_stored(w, (dtypes or {}).get(k)) for k, w in weights.items()}
    if source is not None:
        tensors |= source.skipped
    files = {} if source is None else companions(source.folder)
    files |= {name: text.encode() for name, text in {CONFIG: _json(config), **(texts or {})}.items()}
    if is_apr(path):
        write_model(path, decoded(files), tensors)
        return
    with replace_folder(path, owns=_OWNED) as new:
        write_shards(new, tensors, shard_bytes)
        for name, content in files.items():
            (new / name).write_bytes(content)


def replaced(path: Path) -> list[str]:
    """Return the names of what is there now, and would be gone once a checkpoint is saved to `path`."""
    if not path.is_dir():
        return [path.name] if path.exists() else []
    there = sorted(file.name for file in path.iterdir())
    return [name for name in there if any(fnmatchcase(name, pattern) for pattern in _OWNED)]


def companions(folder: Folder) -> dict[str, bytes]:
    """Return the tokenizer, template and generation files of a checkpoint, by name."""
    return {file.name: file.read_bytes() for file in matching(folder.iterdir(), COMPANIONS)}


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
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(_json(index), encoding="utf-8")


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


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
