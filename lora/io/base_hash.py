"""A hash that tells an adapter's base from what it has become since, for the price of a few pages of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy as np

from lora.backend import Array
from lora.io.checkpoint import Checkpoint

RUNS, RUN_BYTES = 5, 256  # of each tensor: as many pages of it are read, so that no checkpoint is too large


def base_hash(checkpoint: Checkpoint) -> str:
    """Return a SHA-256 of a model's sizes and of each tensor's name, dtype, shape and samples.

    The samples are five runs of 256 bytes, the first and the last of the tensor and three evenly between
    them; a tensor that is not longer is hashed whole. To train, merge or quantise a weight changes values all
    over it, and so its samples; a change to a few of its values alone may lie between them.

    What no model here reads does not count (other keys of config.json, vision, multi-token prediction), and
    neither do the files: a copy, other shards, the other layout and an APR file of a base have its hash.
    """
    # a size that a later version adds is left out where it is nothing, so that hashes stay
    sizes = {name: value for name, value in asdict(checkpoint.spec).items() if value}
    digest = sha256(json.dumps(sizes, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        array = checkpoint.tensors[name]
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(_samples(array))
    return digest.hexdigest()


def base_change(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> str | None:
    """Say that `checkpoint` is not what was trained on, or None where it is.

    Args:
        checkpoint: the base that is at hand.
        facts: of an adapter or a run; without a `base_hash`, as PEFT writes adapters, nothing is known.
    """
    expected = facts.get("base_hash")
    if expected is None or (found := base_hash(checkpoint)) == expected:
        return None
    return (
        f"{checkpoint.folder} is not the base that was trained on, or has changed since: expected "
        f"{str(expected)[:12]}... as the hash of its sizes and weights, found {found[:12]}...; "
        "put that base back, name it as the base, or train anew"
    )


def _samples(array: Array) -> bytes:
    data = array.reshape(-1).view(np.uint8)
    if data.size <= RUNS * RUN_BYTES:
        return data.tobytes()
    starts = np.linspace(0, data.size - RUN_BYTES, RUNS).astype(np.int64)
    return b"".join(data[start : start + RUN_BYTES].tobytes() for start in starts)
