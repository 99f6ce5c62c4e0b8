"""The safetensors format: memory-mapped reading that trusts no byte of the header, and streaming writing.

    8 bytes: length H of the header, little-endian | H bytes: JSON | the tensors, without gap or overlap

Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora.backend import Array, bfloat16, to_host
from lora.errors import FileFormatError, MissingFileError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": bfloat16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # the format's own limit
_MOST_AXES = 8
_BLOCK_BYTES = 64 * 2**20


class Deferred(NamedTuple):
    """A tensor that is made when its turn to be written comes, so that only one of them exists at a time."""

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Array]


Tensor = Array | Deferred


class _Entry(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensors(path: Path) -> dict[str, Array]:
    """Return the tensors of the file by name: read-only memory-mapped arrays in the stored dtype.

    Raises:
        MissingFileError: there is no such file.
        FileFormatError: the file is truncated, or its header is not one that the format allows.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    entries, base = _header(path)
    data = np.memmap(path, np.uint8, mode="r")[base:]
    # asarray: a memmap's slices would go on calling themselves memmaps through every operation
    return {
        name: np.asarray(data[e.start : e.stop].view(e.dtype).reshape(e.shape)) for name, e in entries.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` in their own dtypes; equal inputs give equal bytes.

    Widest dtype first, then by name: with the header padded to 8 bytes every tensor is aligned for its dtype.
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        size = tensor_bytes(tensor)
        header[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for block in tensor_blocks(tensors[name]):
                file.write(block)


def tensor_bytes(tensor: Tensor) -> int:
    """Return the size in bytes of `tensor` on disk."""
    return prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def tensor_blocks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of `tensor` in pieces, so that a file of it is written without a copy of its size."""
    array = to_host(tensor.make() if isinstance(tensor, Deferred) else tensor)
    if array.size == 0:
        return
    rows = array.reshape(1, -1) if array.ndim < 2 else array.reshape(len(array), -1)
    step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        # by way of bytes: bfloat16 has no buffer format of its own
        block = np.ascontiguousarray(rows[start : start + step], tensor.dtype)
        yield block.reshape(-1).view(np.uint8).data


def _header(path: Path) -> tuple[dict[str, _Entry], int]:
    """Return the entries of the checked header, and the offset in the file of the first tensor's bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise FileFormatError(f"{path}: truncated, or not safetensors: {size} bytes, header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_cover(path, entries, size - 8 - length)
    return entries, 8 + length


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, value: Any) -> _Entry:
    match value:
        case {"dtype": str() as dtype, "shape": list() as shape, "data_offsets": [start, stop]} if (
            dtype in _DTYPES and len(shape) <= _MOST_AXES and all(map(_is_count, (*shape, start, stop)))
        ):
            # a zero hides what stands beside it from the product
            small = prod(max(size, 1) for size in shape) < 2**48
            if small and stop - start == prod(shape) * _DTYPES[dtype].itemsize:
                return _Entry(_DTYPES[dtype], tuple(shape), start, stop)
    raise FileFormatError(
        f"{path}: {reprlib.repr(name)}: expected a dtype of {', '.join(_DTYPES)}, a shape, two offsets as "
        f"far apart as both say; found {reprlib.repr(value)}"
    )


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_cover(path: Path, entries: Mapping[str, _Entry], size: int) -> None:
    """Require the tensors to cover the `size` bytes of data one after the other, to the last byte."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise FileFormatError(
                f"{path}: {reprlib.repr(name)} starts at byte {entry.start}, expected {end}"
            )
        end = entry.stop
    if end != size:
        raise FileFormatError(f"{path}: truncated or padded: the header describes {end} bytes, found {size}")
