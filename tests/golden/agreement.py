"""What the checks by hand compare, and how they fail."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from cases import Batch
from families import Family

import lora

TOLERANCE = 1e-5  # norm of the difference over the norm; float32 runs of such models differ by about 1e-6

Check = Callable[[Family, Path], None]


def our_logits(ours: lora.Model, batch: Batch) -> np.ndarray:
    """Our logits at the positions that are not padding, [N, V], or a classifier's, [B, C]."""
    return _counted(np.asarray(ours(batch.input_ids.numpy(), batch.attention_mask.numpy())), batch)


def their_logits(theirs: torch.nn.Module, batch: Batch) -> np.ndarray:
    """Transformers' or PEFT's logits at the same places."""
    with torch.no_grad():
        output = theirs.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return _counted(output.logits.numpy(), batch)


def _counted(logits: np.ndarray, batch: Batch) -> np.ndarray:
    return logits[batch.attention_mask.numpy() == 1] if logits.ndim == 3 else logits


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def require_same_logits(
    what: str, actual: np.ndarray, expected: np.ndarray, *, tolerance: float = TOLERANCE
) -> None:
    """Fail unless the logits agree; say by how much they differ."""
    difference = relative_difference(actual, expected)
    require(difference < tolerance, f"{what}: logits differ by {difference:.1e}, allowed {tolerance:.0e}")
    print(f"  {what}: logits differ by {difference:.1e}")


def require_visible(before: np.ndarray, after: np.ndarray) -> None:
    """Fail unless an adapter moves the logits: one that does nothing would agree with anything."""
    require(relative_difference(before, after) > 0.01, "the adapter changes nothing that a check could see")


def require(condition: bool, message: str) -> None:
    """Fail with `message` unless `condition`."""
    if not condition:
        raise AssertionError(message)


def run(checks: Mapping[str, Iterable[tuple[Family, Check]]], names: list[str]) -> None:
    """Run every check of the named families, or of all; each in an empty folder."""
    torch.set_num_threads(2)
    for name in names or checks:
        for family, check in checks[name]:
            print(f"{name}: {check.__name__}")
            with tempfile.TemporaryDirectory() as folder:
                check(family, Path(folder))
