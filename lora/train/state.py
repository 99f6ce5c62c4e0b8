"""The state that a killed run goes on from, in one file: a rename replaces it, so it is always a whole one.

    parameters/<name>  moments/m/<name>  moments/v/<name>  float32    facts  JSON, uint8    sha256  uint8

The trained arrays are kept as they are trained: under full training the dtype that they are stored in
would lose bits that the next step needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora.backend import Array, beside, to_host
from lora.errors import FileFormatError
from lora.io.atomic import write_atomically
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.train.optimizer import AdamW

STATE_FILE = "state.safetensors"
FACTS, CHECKSUM = "facts", "sha256"


class State(NamedTuple):
    """A state on the disk whose every bit was checked."""

    path: Path
    arrays: Mapping[str, Array]  # by the names above, read-only and memory-mapped
    facts: dict[str, Any]


def write_state(path: Path, optimizer: AdamW, facts: Mapping[str, Any]) -> None:
    """Write the trained arrays, their moments and `facts`, JSON values; the old file or the new one stays.

    Raises:
        WriteError: the file could not be written; the last state is unharmed.
    """
    tensors = {name: to_host(array) for name, array in _live(optimizer).items()}
    text = json.dumps({**facts, "optimizer_steps": optimizer.steps}, allow_nan=False)
    tensors[FACTS] = np.frombuffer(text.encode(), np.uint8)
    tensors[CHECKSUM] = _checksum(tensors)
    with write_atomically(path) as temporary:
        write_tensors(temporary, tensors, {})


def read_state(path: Path) -> State:
    """Return the state that `write_state` wrote.

    Raises:
        MissingFileError: there is no such file.
        FileFormatError: the file is truncated, or a bit of it has changed.
    """
    arrays = read_tensors(path)
    if CHECKSUM not in arrays or FACTS not in arrays or not _is_whole(arrays):
        raise FileFormatError(f"{path}: corrupt: its content does not have the checksum that it holds")
    del arrays[CHECKSUM]
    return State(path, arrays, json.loads(arrays.pop(FACTS).tobytes()))


def restore(state: State, optimizer: AdamW) -> None:
    """Put the trained arrays, their moments and the count of steps of `state` in their place.

    Raises:
        FileFormatError: the state is of another model; nothing was moved.
    """
    if state.facts["optimizer_steps"]:
        optimizer.make_moments()
    live = _live(optimizer)
    wrong = sorted(
        name
        for name in state.arrays.keys() | live.keys()
        if _form(state.arrays.get(name)) != _form(live.get(name))
    )
    if wrong:
        raise FileFormatError(f"{state.path}: the state of another model: {', '.join(wrong[:20])} do not fit")
    for name, array in live.items():
        array[...] = beside(state.arrays[name], array)
    optimizer.steps = state.facts["optimizer_steps"]


def _form(array: Array | None) -> tuple[Any, ...] | None:
    return None if array is None else (array.shape, array.dtype)


def _live(optimizer: AdamW) -> dict[str, Array]:
    """Return every array that a step moves, by its name in the file."""
    arrays = {f"parameters/{name}": array for name, array in optimizer.model.trainable().items()}
    for name, (m, v) in optimizer.moments.items():
        arrays |= {f"moments/m/{name}": m, f"moments/v/{name}": v}
    return arrays


def _is_whole(arrays: Mapping[str, Array]) -> bool:
    return arrays[CHECKSUM].tobytes() == _checksum(arrays).tobytes()


def _checksum(arrays: Mapping[str, Array]) -> Array:
    """Return a SHA-256 over names, dtypes, shapes and bytes of all arrays but the checksum, [32] uint8."""
    digest = sha256()
    for name in sorted(arrays.keys() - {CHECKSUM}):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)
