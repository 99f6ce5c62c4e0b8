"""Reading a checkpoint: a folder as Transformers lays it out, or an APR file that stands for one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora.backend import Array, bfloat16
from lora.errors import FileFormatError, LoadError, MissingFileError
from lora.io.apr_folder import AprFolder, AprText, Folder
from lora.io.safetensors_file import read_tensors
from lora.io.small_files import CONFIG
from lora.spec import ModelSpec, canonical_name, is_skipped, layout_of, read_spec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_STORED_DTYPES = (np.dtype("float64"), np.dtype("float32"), np.dtype("float16"), bfloat16)
_MOST_LISTED = 20
_COMPARED_ROWS = 4096  # at a time: an embedding is too large for a temporary of its size


class Checkpoint(NamedTuple):
    """A checkpoint whose files were found whole; its tensors are on the disk still."""

    folder: Folder
    config: Mapping[str, Any]  # config.json as it is
    spec: ModelSpec
    layout: str  # "text" or "multimodal"
    tensors: Mapping[str, Array]  # by canonical name, read-only and memory-mapped, in the stored dtype
    skipped: Mapping[str, Array]  # by stored name: vision and multi-token prediction, copied on a merge


def open_checkpoint(folder: Folder) -> Checkpoint:
    """Read the config and the headers of the weights in `folder`; of an APR file all bytes, for its checksum.

    Raises:
        MissingFileError: there is no such folder.
        FileFormatError: a file is truncated or corrupt.
        ContractError: the config does not fit its family.
        LoadError: the folder holds no such checkpoint, or its index and its files disagree.
    """
    config = read_config(folder)
    spec = read_spec(config)
    stored = _stored_tensors(folder)
    read = {name: array for name, array in stored.items() if not is_skipped(name, spec.family)}
    layout = layout_of(read)
    return Checkpoint(
        folder=folder,
        config=config,
        spec=spec,
        layout=layout,
        tensors={canonical_name(name, layout): array for name, array in read.items()},
        skipped={name: array for name, array in stored.items() if name not in read},
    )


def load_weights(
    checkpoint: Checkpoint,
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> dict[str, Array]:
    """Return the tensors that `expected` names, each of the shape it says, by canonical name.

    A name of `optional` may be absent, and may be present in any shape where `expected` has none. A tied
    model's file may store its head a second time; it must hold the embedding's very bytes and is left out.

    Raises:
        LoadError: tensors are missing, unexpected, misshapen, or of no floating dtype; one error lists them.
    """
    weights = dict(checkpoint.tensors)
    problems = _tied_head_problems(checkpoint, weights, expected)
    _list(problems, "missing", [name for name in expected if name not in weights and name not in optional])
    _list(
        problems, "not expected", [name for name in weights if name not in expected and name not in optional]
    )
    _list(
        problems,
        "of another shape",
        [
            f"{name} {list(weights[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in weights and weights[name].shape != shape
        ],
    )
    _list(
        problems,
        "of no floating dtype",
        [f"{name} {array.dtype}" for name, array in weights.items() if array.dtype not in _STORED_DTYPES],
    )
    if problems:
        raise LoadError(
            f"{checkpoint.folder}: the tensors are not those that config.json describes: "
            + "; ".join(problems)
        )
    return weights


def read_config(folder: Folder) -> dict[str, Any]:
    """Return the content of config.json in `folder`.

    Raises:
        MissingFileError: there is no such folder.
        LoadError: it holds no config.json.
        FileFormatError: config.json is no JSON object.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder; expected one with {CONFIG} and {SINGLE}")
    if not (folder / CONFIG).is_file():
        raise LoadError(f"{folder}: holds no {CONFIG}; expected a checkpoint as Transformers saves it")
    return read_json_object(folder / CONFIG)


def read_json_object(path: Path | AprText) -> dict[str, Any]:
    """Return the JSON object in the file `path`.

    Raises:
        FileFormatError: the file holds none.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _stored_tensors(folder: Folder) -> dict[str, Array]:
    if isinstance(folder, AprFolder):
        return folder.tensors
    if (folder / SINGLE).is_file():
        return read_tensors(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded_tensors(folder)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise LoadError(
        f"{folder}: holds neither {SINGLE} nor {INDEX}; found {found}. Weights in another format must be "
        "saved as safetensors first"
    )


def read_index(folder: Path) -> dict[str, str]:
    """Return the name of the file in `folder` that holds each tensor, from model.safetensors.index.json.

    Raises:
        FileFormatError: the index does not say that.
    """
    where = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(_is_plain_name(file) for file in where.values()):
        raise FileFormatError(
            f"{folder / INDEX}: expected a weight_map from tensors to files of the same folder"
        )
    return where


def _sharded_tensors(folder: Path) -> dict[str, Array]:
    where = read_index(folder)
    files = sorted(set(where.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise LoadError(f"{folder}: files that {INDEX} names are missing: {', '.join(missing)}")
    tensors: dict[str, Array] = {}
    problems: list[str] = []
    for file in files:
        held = read_tensors(folder / file)
        listed = {name for name, holder in where.items() if holder == file}
        _list(problems, f"not in {file}", sorted(listed - held.keys()))
        _list(problems, f"in {file} and not in the index", sorted(held.keys() - listed))
        tensors |= held
    if problems:
        raise LoadError(f"{folder}: {INDEX} and the files disagree: " + "; ".join(problems))
    return tensors


def _is_plain_name(file: Any) -> bool:
    # a name with a folder in it could read, and on a merge copy, any file of the machine
    return isinstance(file, str) and Path(file).name == file


def _tied_head_problems(
    checkpoint: Checkpoint, weights: dict[str, Array], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    head = "lm_head.weight"
    if not checkpoint.spec.tie_word_embeddings or head in expected or head not in weights:
        return []
    stored, embedding = weights.pop(head), checkpoint.tensors.get("model.embed_tokens.weight")
    if embedding is not None and _same_bytes(stored, embedding):
        return []
    return [f"{head} differs from model.embed_tokens.weight, though tie_word_embeddings is true"]


def _same_bytes(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    blocks = (slice(start, start + _COMPARED_ROWS) for start in range(0, len(a), _COMPARED_ROWS))
    return all(np.array_equal(a[rows].view(np.uint8), b[rows].view(np.uint8)) for rows in blocks)


def _list(problems: list[str], kind: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        problems.append(f"{kind}: {', '.join(names[:_MOST_LISTED])}{more}")
