"""Generation with a cache against the argmax of whole forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.errors import UsageError
from lora.model.loading import load
from tests.harness.models import FAMILIES, TINY_QWEN2, write_model
from tests.model.test_model import adapted, padded, sequences


def grown(model: Any, row: np.ndarray, count: int) -> list[int]:
    """Return the greedy continuation of one row without any cache."""
    ids = list(row)
    for _ in range(count):
        ids.append(int(model([ids])[0, -1].argmax()))
        if ids[-1] in model.spec.eos_token_ids:
            break
    return ids[len(row) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(tmp_path: Path, family: str) -> None:
    model, rows = adapted(write_model(tmp_path / "base", FAMILIES[family])), sequences()
    new = model.generate(*(padded(rows)[0],), 9, attention_mask=padded(rows)[1])
    assert [row.tolist() for row in new] == [grown(model, row, 9) for row in rows]


def test_a_row_stops_at_its_end_token(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    free = load(base).generate([[3, 4, 5]], 6)[0]
    config = TINY_QWEN2 | {"eos_token_id": [int(free[2]), 60]}
    stopped = load(write_model(tmp_path / "other", config)).generate([[3, 4, 5]], 6)[0]
    first = free.tolist().index(free[2])
    assert stopped.tolist() == free[: first + 1].tolist()


def test_generation_needs_a_causal_model(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    with pytest.raises(UsageError):
        load(base, num_labels=2).generate([[1]])
    with pytest.raises(UsageError):
        load(base).generate([[1]], 0)
