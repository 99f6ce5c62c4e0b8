"""Attempts to falsify contracts/training/apr.yaml."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.io.apr
from lora.contracts import training_contract
from lora.errors import FileFormatError
from lora.io.apr import read_apr, write_apr
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("apr")
NAMES = ("z.weight", "a.bias", "ß", "lora.10.q_proj.lora_a")
METADATA = {"name": "x", "architecture": "qwen2", "hidden_size": 4}


class Case(NamedTuple):
    tensors: int
    seed: int

    def held(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        dtypes = [np.float16, np.float32, np.int8, np.float64]
        return {
            name: (9 * rng.standard_normal((2, 1 + number))).astype(dtypes[number])
            for number, name in enumerate(NAMES[: self.tensors])
        }


def written(write: Any, metadata: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    with TemporaryDirectory() as parent:
        write(Path(parent) / "model.apr", metadata, tensors)
        return (Path(parent) / "model.apr").read_bytes()


def read(raw: bytes) -> lora.io.apr.AprFile:
    with TemporaryDirectory() as parent:
        (Path(parent) / "model.apr").write_bytes(raw)
        return read_apr(Path(parent) / "model.apr")  # the map outlives the name


def check_bits(write: Any, case: Case) -> None:
    held = case.held()
    found = read(written(write, METADATA, held)).tensors
    assert found.keys() == held.keys()
    for name, array in held.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def check_damage(write: Any, case: Case) -> None:
    raw = written(write, METADATA, case.held())
    read(raw)
    at = case.seed % len(raw)
    damaged = raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]
    with pytest.raises(FileFormatError):
        read(damaged)
    assert raw[40:44] == struct.pack("<I", zlib.crc32(raw[:40] + raw[44:64]))


def check_sorted(write: Any, case: Case) -> None:
    held = case.held()
    raw = written(write, METADATA, held)
    places = [raw.index(struct.pack("<H", len(n.encode())) + n.encode(), 128) for n in held]
    order = [name for _, name in sorted(zip(places, held, strict=True))]
    assert order == sorted(held, key=str.encode)


def check_same_bytes(write: Any, case: Case) -> None:
    raw = written(write, METADATA, case.held())
    metadata, tensors = read(raw)
    turned = dict(reversed(metadata.items())), dict(reversed(tensors.items()))
    assert written(write, *turned) == raw


CHECKS = {
    "F-CKPT-010": check_bits,
    "F-CKPT-011": check_damage,
    "F-CKPT-015": check_sorted,
    "F-CKPT-018": check_same_bytes,
}
CASES = st.builds(Case, st.integers(*CONTRACT.domain["tensors"]), seeds)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(write_apr, case)


def widens_to_single(path: Path, metadata: Any, tensors: Any) -> None:
    write_apr(path, metadata, {name: array.astype(np.float32) for name, array in tensors.items()})


def flattens(path: Path, metadata: Any, tensors: Any) -> None:
    write_apr(path, metadata, {name: array.reshape(-1) for name, array in tensors.items()})


def forgets_the_last_checksum(path: Path, metadata: Any, tensors: Any) -> None:
    write_apr(path, metadata, tensors)
    path.write_bytes(path.read_bytes()[:-4])


def forgets_the_header_checksum(path: Path, metadata: Any, tensors: Any) -> None:
    write_apr(path, metadata, tensors)
    raw = path.read_bytes()
    path.write_bytes(raw[:40] + bytes(4) + raw[44:])


def index_as_it_comes(path: Path, metadata: Any, tensors: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora.io.apr, "sorted", lambda names, key: list(names), raising=False)
        write_apr(path, metadata, tensors)


def metadata_as_it_comes(path: Path, metadata: Any, tensors: Any) -> None:
    plain = lora.io.apr.json.dumps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lora.io.apr.json, "dumps", lambda value, **how: plain(value, **how | {"sort_keys": False})
        )
        write_apr(path, metadata, tensors)


MUTANTS = {
    "widens_to_single": widens_to_single,
    "flattens": flattens,
    "forgets_the_last_checksum": forgets_the_last_checksum,
    "forgets_the_header_checksum": forgets_the_header_checksum,
    "index_as_it_comes": index_as_it_comes,
    "metadata_as_it_comes": metadata_as_it_comes,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
