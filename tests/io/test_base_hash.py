"""What the hash of a base sees, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lora.io.apr_folder import AprFolder, Folder
from lora.io.base_hash import RUN_BYTES, RUNS, base_hash
from lora.io.checkpoint import open_checkpoint
from lora.io.convert import folder_to_apr
from lora.io.save_checkpoint import save_checkpoint
from tests.harness.models import TINY_QWEN2, random_weights, write_model

Weights = dict[str, np.ndarray]
CONFIG = TINY_QWEN2 | {"num_hidden_layers": 1}
NAMES = sorted(random_weights(CONFIG))


def hash_of(folder: Folder) -> str:
    return base_hash(open_checkpoint(folder))


def written(folder: Path, weights: Weights) -> Path:
    save_checkpoint(folder, weights, CONFIG)
    return folder


def test_where_and_in_which_files_a_base_lies_does_not_count(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    expected = hash_of(written(tmp_path / "base", weights))
    assert hash_of(written(tmp_path / "copy", dict(reversed(weights.items())))) == expected
    save_checkpoint(tmp_path / "shards", weights, CONFIG, shard_bytes=5_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert hash_of(tmp_path / "shards") == expected
    config = tmp_path / "shards" / "config.json"
    config.write_text(json.dumps(CONFIG | {"transformers_version": "5.0.0"}))
    assert hash_of(tmp_path / "shards") == expected
    folder_to_apr(tmp_path / "base", tmp_path / "base.apr")
    assert hash_of(AprFolder(tmp_path / "base.apr")) == expected


@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_that_was_trained_is_seen(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    before = hash_of(written(tmp_path / "base", weights))
    moved = weights[name] * np.float32(1 + 1e-6)
    assert hash_of(written(tmp_path / "moved", weights | {name: moved})) != before


def test_another_dtype_and_another_config_are_seen(tmp_path: Path) -> None:
    weights = {name: np.ones_like(array) for name, array in random_weights(CONFIG).items()}
    hashes = {hash_of(written(tmp_path / "base", weights))}
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = {name: array.astype(dtype) for name, array in weights.items()}
        hashes.add(hash_of(written(tmp_path / np.dtype(dtype).name, narrow)))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(CONFIG | {"rope_theta": 20_000.0}))
    hashes.add(hash_of(tmp_path / "base"))
    assert len(hashes) == 4


def changed(at: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        data = bytearray(array.tobytes())
        data[at] ^= 1
        return np.frombuffer(bytes(data), array.dtype).reshape(array.shape)

    return change


def test_samples_are_read_and_not_the_whole(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 128}
    folder, name = write_model(tmp_path / "base", config), "model.layers.0.mlp.up_proj.weight"
    weights = random_weights(config)
    size = weights[name].nbytes
    assert size > 2 * RUNS * RUN_BYTES
    before = hash_of(folder)
    for at, is_seen in (
        (0, True),
        (RUN_BYTES, False),
        (size // 2, True),
        (size - RUN_BYTES - 1, False),
        (-1, True),
    ):
        save_checkpoint(folder, weights | {name: changed(at)(weights[name])}, config)
        assert (hash_of(folder) != before) == is_seen, at
