"""APR v2, the seed's own file format: memory-mapped reading that trusts no byte, and deterministic writing.

    header 64 B | metadata, a JSON object | tensor index, sorted by name | tensors | CRC-32 of all before

Each part is padded with zeros to 64 bytes; all integers are little-endian. A file may end without the
last CRC, where its last padded tensor does. The index entry of a tensor:

    u16 length of the name | name | u8 dtype | u8 axes | u64 each size | u64 offset in the data | u64 bytes
"""

from __future__ import annotations

import json
import reprlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lora.backend import Array, bfloat16
from lora.errors import FileFormatError, MissingFileError, UnsupportedError, ValidationError
from lora.io.safetensors_file import Tensor, tensor_blocks, tensor_bytes

MAGIC = b"APR\0"
VERSION = (2, 0)
ROW_MAJOR = 0x400
# what a reader cannot look past, by the bit of the header's flags
_REFUSED = {
    0x1: "LZ4 compression",
    0x2: "ZSTD compression",
    0x4: "encryption",
    0x10: "sharding",
    0x800: "column-major layout",
}
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    3: np.dtype("<f8"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("i1"),
    7: np.dtype("u1"),
    30: bfloat16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_QUANTISED = {8: "AprQ4", 9: "AprQ8", 12: "Q4K", 14: "Q6K", 128: "AprQ4", 129: "AprQ8"}
_HEADER = struct.Struct("<4s2BHIQIQQI20s")
_CRC_AT = 40  # of the header: its own CRC, which covers what stands before and after it
_CRC_BYTES = 4
_LINE = 64
_MOST_NAME = 256  # bytes
_MOST_AXES = 8
_MOST_METADATA = 100_000_000  # bytes: a tokenizer is some ten million
_BLOCK_BYTES = 64 * 2**20


class AprFile(NamedTuple):
    """What an APR file holds; the tensors are read-only, memory-mapped, in the stored dtype."""

    metadata: dict[str, Any]
    tensors: dict[str, Array]


class _Header(NamedTuple):
    flags: int
    tensor_count: int
    metadata: slice  # of the file's bytes
    entries: slice
    data: int  # where the tensors begin


class _Entry(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # from the beginning of the data
    size: int  # bytes


@dataclass(frozen=True)
class OpenApr:
    """An APR file of which all but the tensors was read and checked; made by `open_apr`."""

    path: Path
    metadata: dict[str, Any]
    _header: _Header
    _entries: tuple[_Entry, ...]
    _data: Array  # the whole file, memory-mapped

    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Return the dtype of each tensor, by name."""
        return {entry.name: entry.dtype for entry in self._entries}

    def read_tensors(self) -> dict[str, Array]:
        """Return the tensors: read-only, memory-mapped, in the stored dtype. The whole file is read once.

        Raises:
            FileFormatError: the file's last CRC does not match.
        """
        held = self._data[:-_CRC_BYTES]
        last = int.from_bytes(self._data[-_CRC_BYTES:].tobytes(), "little")
        if _end_of_tensors(self._header, self._entries) < self._data.size and last != _crc(held):
            raise FileFormatError(f"{self.path}: the CRC-32 of the file does not match: the file is corrupt")
        tensors = self._data[self._header.data :]
        # asarray: a memmap's slices would go on calling themselves memmaps through every operation
        return {
            e.name: np.asarray(tensors[e.start : e.start + e.size].view(e.dtype).reshape(e.shape))
            for e in self._entries
        }


def read_apr(path: Path) -> AprFile:
    """Return the metadata and the tensors of an APR v2 file whose checksums hold; errors as in `open_apr`."""
    opened = open_apr(path)
    return AprFile(opened.metadata, opened.read_tensors())


def open_apr(path: Path) -> OpenApr:
    """Return an APR v2 file whose header's checksum holds and whose every offset lies where it must.

    Of a metadata key that occurs twice the last value counts: old training files hold `null`, then the value.

    Raises:
        MissingFileError: there is no such file.
        UnsupportedError: the file is compressed, encrypted, sharded, column-major or holds quantised tensors.
        FileFormatError: the file is truncated, corrupt or no APR v2 file.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    if path.stat().st_size < _HEADER.size:
        raise FileFormatError(
            f"{path}: truncated, or not APR: {path.stat().st_size} bytes, expected 64 or more"
        )
    data = np.memmap(path, np.uint8, mode="r")
    try:
        header = _read_header(data)
        metadata = _read_metadata(data[header.metadata].tobytes())
        entries = _read_index(data[header.entries].tobytes(), header.tensor_count)
        _check_places(data, header, entries)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    return OpenApr(path, metadata, header, tuple(entries), data)


def write_apr(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` in their own dtypes, and `metadata` with sorted keys: equal inputs give equal bytes.

    Args:
        path: written in place; `write_atomically` gives one to rename.
        metadata: JSON values.
        tensors: arrays, or `Deferred` ones, of up to 8 axes, by names of up to 256 bytes.

    Raises:
        ValidationError: the metadata is not JSON, or the format has no such name, dtype or number of axes.
    """
    order = sorted(tensors, key=str.encode)
    text = _metadata_text(metadata)
    index, offset = b"", 0
    for name in order:
        index += _entry_bytes(name, tensors[name], offset)
        offset += _padded(tensor_bytes(tensors[name]))
    index_at = _LINE + _padded(len(text))
    data_at = index_at + _padded(len(index))
    with path.open("wb") as file:
        writer = _Checked(file)
        writer.write(_header_bytes(len(order), len(text), index_at, data_at))
        for part in (text, index):
            writer.write(part)
            writer.pad(len(part))
        for name in order:
            for block in tensor_blocks(tensors[name]):
                writer.write(block)
            writer.pad(tensor_bytes(tensors[name]))
        file.write(writer.crc.to_bytes(4, "little"))


class _Checked:
    """A file that counts the CRC-32 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.crc = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)

    def pad(self, size: int) -> None:
        """Write the zeros that bring `size` bytes to the next multiple of 64."""
        self.write(bytes(_padded(size) - size))


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _read_header(data: Array) -> _Header:
    raw = data[: _HEADER.size].tobytes()
    magic, major, minor, flags, count, metadata_at, metadata_size, index_at, data_at, crc, _ = _HEADER.unpack(
        raw
    )
    if magic != MAGIC:
        raise FileFormatError(f"not an APR v2 file: it starts with {magic!r}, expected {MAGIC!r}")
    if major != VERSION[0]:
        raise FileFormatError(f"APR version {major}.{minor}, expected 2.0")
    if crc != _header_crc(raw):
        raise FileFormatError("the header's CRC-32 does not match: the file is corrupt")
    found = [what for bit, what in _REFUSED.items() if flags & bit]
    if found:
        raise UnsupportedError(f"{' and '.join(found)} is not built; expected a plain, row-major APR file")
    places = (_LINE, metadata_at, metadata_at + metadata_size, index_at, data_at, data.size)
    if any(low > high for low, high in pairwise(places)) or data_at % _LINE or metadata_size > _MOST_METADATA:
        raise FileFormatError(
            f"truncated or corrupt: metadata of {metadata_size} bytes at {metadata_at}, index at {index_at}, "
            f"data at {data_at}, in a file of {data.size} bytes"
        )
    metadata = slice(metadata_at, metadata_at + metadata_size)
    return _Header(flags, count, metadata, slice(index_at, data_at), data_at)


def _header_crc(raw: bytes) -> int:
    return zlib.crc32(raw[_CRC_AT + 4 :], zlib.crc32(raw[:_CRC_AT]))


def _read_metadata(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"the metadata is no JSON object: {type(value).__name__}")
    return value


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _read_index(raw: bytes, count: int) -> list[_Entry]:
    """Return the `count` entries, sorted by name, that `raw` begins with."""
    entries: list[_Entry] = []
    at, before = 0, b""
    try:
        for number in range(count):
            name, entry, at = _read_entry(raw, at)
            if number and name <= before:
                raise FileFormatError(
                    f"the index is not sorted by unique names at {reprlib.repr(entry.name)}"
                )
            before = name
            entries.append(entry)
    except struct.error as error:
        raise FileFormatError(
            f"the index is truncated: {count} tensors expected, {len(entries)} found"
        ) from error
    return entries


def _read_entry(raw: bytes, at: int) -> tuple[bytes, _Entry, int]:
    """Return (name, entry, where the next one begins)."""
    (length,) = struct.unpack_from("<H", raw, at)
    name = raw[at + 2 : at + 2 + length]
    code, axes = struct.unpack_from("<BB", raw, at + 2 + length)
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"a tensor's name is not UTF-8: {reprlib.repr(name)}") from error
    if length > _MOST_NAME or axes > _MOST_AXES:
        raise FileFormatError(
            f"{reprlib.repr(text)}: a name of {length} bytes, {axes} axes; at most 256 and 8"
        )
    *shape, start, size = struct.unpack_from(f"<{axes + 2}Q", raw, at + 4 + length)
    if code in _QUANTISED:
        raise UnsupportedError(f"{reprlib.repr(text)} is stored as {_QUANTISED[code]}, which is not built")
    if code not in _DTYPES:
        raise FileFormatError(f"{reprlib.repr(text)}: unknown dtype code {code}")
    # a zero hides what stands beside it from the product
    small = prod(max(n, 1) for n in shape) < 2**48
    if not small or size != prod(shape) * _DTYPES[code].itemsize:
        raise FileFormatError(f"{reprlib.repr(text)}: {size} bytes do not hold {shape} of {_DTYPES[code]}")
    end = at + 4 + length + 8 * (axes + 2)
    return name, _Entry(text, _DTYPES[code], tuple(shape), start, size), end


def _check_places(data: Array, header: _Header, entries: list[_Entry]) -> None:
    """Require tensors that lie in the file, none over another, and nothing after them but a last CRC."""
    end = 0
    for entry in sorted(entries, key=lambda e: (e.start, e.size)):
        if entry.start < end or entry.start % _LINE:
            raise FileFormatError(
                f"{reprlib.repr(entry.name)} starts at byte {entry.start} of the data, expected a "
                f"multiple of 64 that is at least {end}"
            )
        end = entry.start + entry.size
    end = _end_of_tensors(header, entries)
    if data.size not in (end, end + _CRC_BYTES):
        raise FileFormatError(f"truncated or padded: {data.size} bytes, expected {end + _CRC_BYTES}")


def _end_of_tensors(header: _Header, entries: Sequence[_Entry]) -> int:
    """Return where in the file the last padded tensor ends."""
    return header.data + _padded(max((entry.start + entry.size for entry in entries), default=0))


def _crc(data: Array) -> int:
    crc = 0
    for start in range(0, data.size, _BLOCK_BYTES):
        crc = zlib.crc32(data[start : start + _BLOCK_BYTES].data, crc)
    return crc


def _metadata_text(metadata: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(
            metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except (TypeError, ValueError) as error:
        raise ValidationError(f"the metadata of an APR file must be JSON values: {error}") from error


def _entry_bytes(name: str, tensor: Tensor, offset: int) -> bytes:
    encoded, code, axes = name.encode(), _CODES.get(np.dtype(tensor.dtype)), len(tensor.shape)
    if code is None or len(encoded) > _MOST_NAME or axes > _MOST_AXES:
        raise ValidationError(
            f"{reprlib.repr(name)}: {tensor.dtype} with {axes} axes and a name of {len(encoded)} bytes"
            f"; APR has {', '.join(map(str, _CODES))}, 8 axes and 256 bytes"
        )
    head = struct.pack("<H", len(encoded)) + encoded + struct.pack("<BB", code, axes)
    return head + struct.pack(f"<{axes + 2}Q", *tensor.shape, offset, tensor_bytes(tensor))


def _header_bytes(count: int, metadata_size: int, index_at: int, data_at: int) -> bytes:
    fields = (MAGIC, *VERSION, ROW_MAJOR, count, _LINE, metadata_size, index_at, data_at)
    crc = _header_crc(_HEADER.pack(*fields, 0, bytes(20)))
    return _HEADER.pack(*fields, crc, bytes(20))
