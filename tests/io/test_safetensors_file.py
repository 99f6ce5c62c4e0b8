"""Attempts to break the safetensors reader and writer; the `safetensors` package is the second opinion."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from lora.errors import FileFormatError, MissingFileError
from lora.io.safetensors_file import Deferred, read_tensors, write_tensors

DTYPES = ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1", "?", ml_dtypes.bfloat16]
PT = {"format": "pt"}


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Random bits, NaN payloads among them, in any dtype and shape."""
    names = draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True))
    return {
        name: _bits(draw, np.dtype(draw(st.sampled_from(DTYPES)))) for name in names if name != "__metadata__"
    }


def _bits(draw: st.DrawFn, dtype: np.dtype[Any]) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return rng.integers(0, 2 if dtype == np.bool_ else 256, count, "u1").view(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


@given(expected=tensors())
def test_every_bit_comes_back(path: Path, expected: dict[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)  # the last file may be mapped still
    write_tensors(path, expected, PT)
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


@given(expected=tensors())
def test_the_safetensors_package_reads_what_is_written(path: Path, expected: dict[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    write_tensors(path, expected, PT)
    found = safetensors.numpy.load_file(path)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == PT


@given(expected=tensors())
def test_what_the_safetensors_package_writes_is_read(path: Path, expected: dict[str, np.ndarray]) -> None:
    path.unlink(missing_ok=True)
    safetensors.numpy.save_file(expected, path)
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    a, b = np.arange(3.0), np.arange(4, dtype="<f2")
    write_tensors(tmp_path / "1", {"b": b, "a": a}, PT)
    write_tensors(tmp_path / "2", {"a": a, "b": b}, PT)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_tensors_are_mapped_read_only_and_aligned(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "x", {"odd": np.ones(3, "u1"), "wide": np.ones(3), "n" * 5: np.ones(2, "f4")}, PT
    )
    for array in read_tensors(tmp_path / "x").values():
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner, mmap.mmap)
        assert type(array) is np.ndarray
        assert array.flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_deferred_tensor_is_made_when_its_turn_comes_and_stored_in_its_dtype(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> np.ndarray:
        made.append(name)
        return np.array([[1.5, -2.0]], "f4")

    lazy = {name: Deferred((1, 2), ml_dtypes.bfloat16, lambda name=name: make(name)) for name in "ab"}
    write_tensors(tmp_path / "x", lazy, PT)
    assert made == ["a", "b"]
    assert all(
        same(t, np.array([[1.5, -2.0]], ml_dtypes.bfloat16)) for t in read_tensors(tmp_path / "x").values()
    )


@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(path: Path, data: st.DataObject) -> None:
    path.unlink(missing_ok=True)
    write_tensors(path, {"a": np.arange(5.0), "b": np.ones((2, 3), "<f2")}, PT)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FileFormatError):
        read_tensors(path)


def test_bytes_too_many_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": np.arange(5.0)}, PT)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes() + b"\0")
    with pytest.raises(FileFormatError, match="describes 40 bytes, found 41"):
        read_tensors(tmp_path / "x")


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE: dict[str, Any] = {
    "overlap": {"a": F32, "b": F32},
    "gap": {"a": F32, "b": {**F32, "data_offsets": [8, 12]}},
    "beyond the end": {"a": {**F32, "shape": [1000], "data_offsets": [0, 4000]}},
    "negative offset": {"a": {**F32, "data_offsets": [-4, 0]}},
    "reversed offsets": {"a": {**F32, "data_offsets": [4, 0]}},
    "offsets of another size": {"a": {**F32, "data_offsets": [0, 8]}},
    "negative size": {"a": {**F32, "shape": [-1]}},
    "product of negatives": {"a": {**F32, "shape": [-1, -1]}},
    "true for one": {"a": {**F32, "shape": [True]}},
    "a float for a size": {"a": {**F32, "shape": [1.0]}},
    "a zero that hides 2^70": {"a": {**F32, "shape": [0, 2**70], "data_offsets": [0, 0]}},
    "zeros that hide an overflow": {"a": {**F32, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
    "too many axes": {"a": {**F32, "shape": [1] * 80}},
    "unknown dtype": {"a": {**F32, "dtype": "F4"}},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "three offsets": {"a": {**F32, "data_offsets": [0, 2, 4]}},
    "a number for an entry": {"a": 5},
    "a list for a header": [F32],
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "deep nesting": b"[" * 100_000,
    "a name twice": b'{"a":%(f32)s,"a":%(f32)s}' % {b"f32": json.dumps(F32).encode()},
    "digits without end": b'{"a":' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, case: str) -> None:
    # as many bytes as the last offset asks for, so that each case is refused for its own reason
    data = b"\0" * {"gap": 12, "a name twice": 4}.get(case, 8)
    (tmp_path / "x").write_bytes(file_of(HOSTILE[case], data))
    with pytest.raises(FileFormatError, match=str(tmp_path)):
        read_tensors(tmp_path / "x")


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for length in (2**63, 2**40, 11):
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b'{"a":1}   ')
        with pytest.raises(FileFormatError, match=str(length)):
            read_tensors(tmp_path / "x")


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_damage_is_refused_or_harmless(path: Path, flips: list[tuple[int, int]]) -> None:
    path.unlink(missing_ok=True)
    write_tensors(path, {"a": np.arange(5.0), "b": np.ones((2, 3), "<f2")}, PT)
    raw = bytearray(path.read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    path.unlink()
    path.write_bytes(bytes(raw))
    try:
        found = read_tensors(path)
    except FileFormatError:
        return
    # what is read lies inside the file, to the last byte
    assert sum(array.nbytes for array in found.values()) <= len(raw) - 8
    assert all(isinstance(array.tobytes(), bytes) for array in found.values())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nothing\.safetensors"):
        read_tensors(tmp_path / "nothing.safetensors")
