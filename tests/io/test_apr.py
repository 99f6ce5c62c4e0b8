"""The APR v2 file: what was written comes back bit for bit, and no byte of a hostile file is trusted."""

from __future__ import annotations

import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lora.backend import bfloat16
from lora.errors import FileFormatError, MissingFileError, UnsupportedError, ValidationError
from lora.io.apr import read_apr, write_apr

DTYPES = ["<f4", "<f2", "<f8", "<i4", "<i8", "i1", "u1", bfloat16]
METADATA = {"architecture": "qwen2", "hidden_size": 16, "name": "größe", "nested": {"b": [1, None], "a": 0.5}}
TENSORS = {
    "model.norm.weight": np.arange(5, dtype=np.float32),
    "b": np.arange(6, dtype=bfloat16).reshape(2, 3),
    "empty": np.zeros((0, 3), np.int64),
    "scalar": np.array(2.5),
}
DATA_AT, INDEX_AT = 32, 24  # offsets in the header


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    held = {}
    for name in draw(st.sets(names, max_size=5)):
        dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), draw(shapes)
        held[name] = (
            np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), np.uint8)
            .view(dtype)
            .reshape(shape)
        )
    return held


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("apr") / "model.apr"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "model.apr"
    write_apr(file, METADATA, TENSORS)
    return file.read_bytes()


def resealed(raw: bytes) -> bytes:
    """Return `raw` with both checksums put right, so that the parser itself is attacked."""
    body = bytearray(raw[:-4])
    body[40:44] = struct.pack("<I", zlib.crc32(bytes(body[:40]) + bytes(body[44:64])))
    return bytes(body) + struct.pack("<I", zlib.crc32(bytes(body)))


def put(raw: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(form, changed, at, value)
    return resealed(bytes(changed))


def read_bytes(path: Path, raw: bytes) -> Any:
    path.unlink(missing_ok=True)  # an open map of the old file must not change under its reader
    path.write_bytes(raw)
    return read_apr(path)


@given(held=tensors())
def test_what_is_written_is_read_and_written_again_bit_for_bit(path: Path, held: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)
    write_apr(path, METADATA, held)
    raw = path.read_bytes()
    metadata, found = read_apr(path)
    assert metadata == METADATA
    assert list(found) == sorted(held, key=str.encode)
    for name, array in held.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable
        assert found[name].flags.aligned
    again = path.with_name("again.apr")
    write_apr(again, metadata, dict(reversed(found.items())))
    assert again.read_bytes() == raw


def test_the_bytes_are_those_of_the_format(path: Path) -> None:
    path.unlink(missing_ok=True)
    write_apr(path, {"b": 1, "a": "x"}, {"w": np.array([1.5, 2.5], np.float32)})
    raw = path.read_bytes()
    assert raw[:8] == b"APR\0\x02\x00\x00\x04"
    assert struct.unpack_from("<IQIQQ", raw, 8) == (1, 64, 15, 128, 192)
    assert raw[64:128] == b'{"a":"x","b":1}'.ljust(64, b"\0")
    entry = b"\x01\x00w\x00\x01" + struct.pack("<3Q", 2, 0, 8)
    assert raw[128:192] == entry.ljust(64, b"\0")
    assert raw[192:256] == struct.pack("<2f", 1.5, 2.5).ljust(64, b"\0")
    assert raw[40:44] == struct.pack("<I", zlib.crc32(raw[:40] + raw[44:64]))
    assert raw[256:] == struct.pack("<I", zlib.crc32(raw[:256]))


def test_a_file_without_the_last_crc_is_read(path: Path, whole: bytes) -> None:
    assert read_bytes(path, whole[:-4]).metadata == METADATA


def test_the_last_of_two_equal_keys_counts(path: Path, whole: bytes) -> None:
    old = json.dumps(METADATA, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    twice = b'{"name":null,"name":"y"}'
    raw = resealed(whole.replace(old, twice.ljust(len(old))))
    assert read_bytes(path, raw).metadata == {"name": "y"}


@given(cut=st.integers(0, 10**6))
def test_a_truncated_file_is_refused(path: Path, whole: bytes, cut: int) -> None:
    cut %= len(whole)
    if cut == len(whole) - 4:
        return  # all but the last CRC
    with pytest.raises(FileFormatError, match=r"model\.apr"):
        read_bytes(path, whole[:cut])


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(path: Path, whole: bytes, at: int, bit: int) -> None:
    raw = bytearray(whole)
    raw[at % len(raw)] ^= 1 << bit
    with pytest.raises(FileFormatError, match=r"model\.apr"):
        read_bytes(path, bytes(raw))


@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 64),
)
def test_a_changed_file_whose_checksums_hold_is_read_or_refused(
    path: Path, whole: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    end = len(whole) - 4
    raw = bytearray(whole)
    for at, value in changes:
        raw[at % end] = value
    changed = resealed(bytes(raw[: len(raw) - cut]))
    with suppress(FileFormatError, UnsupportedError):  # nothing else may be raised
        found = read_bytes(path, changed)
        assert sum(array.nbytes for array in found.tensors.values()) <= len(changed)


@given(raw=st.binary(max_size=400))
def test_any_bytes_are_refused(path: Path, raw: bytes) -> None:
    with pytest.raises(FileFormatError):
        read_bytes(path, b"APR\0" + raw)


@pytest.mark.parametrize(
    ("at", "form", "value", "said"),
    [
        (4, "<B", 1, "version 1.0"),
        (8, "<I", 2**32 - 1, "do not hold"),
        (12, "<Q", 2**64 - 1, "truncated or corrupt"),
        (20, "<I", 2**32 - 1, "truncated or corrupt"),
        (INDEX_AT, "<Q", 2**63, "truncated or corrupt"),
        (DATA_AT, "<Q", 2**64 - 64, "truncated or corrupt"),
        (DATA_AT, "<Q", 2**62 + 1, "truncated or corrupt"),
        (64, "<B", 0x5B, "not JSON"),
    ],
)
def test_hostile_headers_are_refused(
    path: Path, whole: bytes, at: int, form: str, value: int, said: str
) -> None:
    with pytest.raises(FileFormatError, match=said):
        read_bytes(path, put(whole, at, form, value))


def entry_at(raw: bytes) -> int:
    """Return where the first entry of the index begins: that of "b", bfloat16 [2, 3]."""
    return int(struct.unpack_from("<Q", raw, INDEX_AT)[0])


@pytest.mark.parametrize(
    ("at", "form", "value", "said"),
    [
        (0, "<H", 2**16 - 1, "truncated"),
        (2, "<B", 0x7A, "not sorted"),
        (2, "<B", 0xFF, "not UTF-8"),
        (3, "<B", 99, "unknown dtype code 99"),
        (4, "<B", 9, "9 axes"),
        (5, "<Q", 2**63, "do not hold"),
        (5, "<Q", 0, "do not hold"),
        (21, "<Q", 2**64 - 64, "truncated or padded|starts at byte"),
        (21, "<Q", 1, "multiple of 64"),
        (29, "<Q", 2**64 - 1, "do not hold"),
    ],
)
def test_hostile_entries_are_refused(
    path: Path, whole: bytes, at: int, form: str, value: int, said: str
) -> None:
    with pytest.raises(FileFormatError, match=said):
        read_bytes(path, put(whole, entry_at(whole) + at, form, value))


@pytest.mark.parametrize("code", [8, 9, 12, 14, 128, 129])
def test_quantised_tensors_are_refused_by_name(path: Path, whole: bytes, code: int) -> None:
    with pytest.raises(UnsupportedError, match=r"'b' is stored as (AprQ|Q)"):
        read_bytes(path, put(whole, entry_at(whole) + 3, "<B", code))


@pytest.mark.parametrize(
    ("flag", "said"),
    [(1, "LZ4"), (2, "ZSTD"), (4, "encryption"), (0x10, "sharding"), (0x800, "column-major")],
)
def test_what_cannot_be_read_plainly_is_refused_by_name(
    path: Path, whole: bytes, flag: int, said: str
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        read_bytes(path, put(whole, 6, "<H", 0x400 | flag))


def test_deep_json_is_refused(path: Path) -> None:
    path.unlink(missing_ok=True)
    write_apr(path, {"a": "x" * 400_000}, {})
    raw = path.read_bytes().replace(b'"' + b"x" * 400_000 + b'"', b"[" * 200_001 + b"]" * 200_001)
    with pytest.raises(FileFormatError, match="not JSON"):
        read_bytes(path, resealed(raw))


def test_what_the_format_has_no_place_for_is_not_written(path: Path) -> None:
    for metadata, held in (
        ({"a": float("nan")}, {}),
        ({}, {"x": np.zeros(2, np.complex64)}),
        ({}, {"x" * 257: np.zeros(2, np.float32)}),
        ({}, {"x": np.zeros((1,) * 9, np.float32)}),
    ):
        path.unlink(missing_ok=True)
        with pytest.raises(ValidationError):
            write_apr(path, metadata, held)
        assert not path.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.apr"):
        read_apr(tmp_path / "none.apr")
