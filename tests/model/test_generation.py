"""Generation with a cache against whole forwards, and what the draws depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.data.packed import pack
from lora.errors import UsageError
from lora.model.loading import load
from lora.model.sampling import Sampling
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
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            load(base).generate([[1]], 2, **settings)


def test_a_stop_id_ends_a_row_beside_the_end_tokens(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "base"))
    free = model.generate([[3, 4, 5]], 6)[0].tolist()
    stopped = model.generate([[3, 4, 5]], 6, stop_ids=[free[2]])[0].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_leave_the_batch_and_change_no_other(tmp_path: Path, family: str) -> None:
    model, rows = adapted(write_model(tmp_path / "base", FAMILIES[family])), sequences()
    alone = [grown(model, row, 9) for row in rows]
    # one row after another ends, the first in the middle of the batch
    wholes = [row[: (6, 2, 9, 4)[i % 4]] for i, row in enumerate(alone)]
    found: list[list[int]] = [[] for _ in rows]
    widths = []
    for step in model.stream(pack(rows), 9, Sampling(), lambda row, new: list(new) == wholes[row]):
        widths.append(len(step))
        for row, token in step:
            found[row].append(token)
    assert found == wholes
    assert widths == [sum(len(row) > i for row in wholes) for i in range(len(widths))]


def test_the_seed_and_the_prompt_decide_and_the_batch_does_not(tmp_path: Path) -> None:
    model, rows = load(write_model(tmp_path / "base"), dtype="float64"), sequences()
    ids, mask = padded(rows)
    settings = {"temperature": 1.3, "top_p": 0.95, "top_k": 40}
    together = model.generate(ids, 9, attention_mask=mask, seed=7, **settings)
    for row, new in zip(rows, together, strict=True):
        assert model.generate([row], 9, seed=7, **settings)[0].tolist() == new.tolist()
    others = model.generate(ids, 9, attention_mask=mask, seed=8, **settings)
    assert any(new.tolist() != other.tolist() for new, other in zip(together, others, strict=True))


def test_nothing_sharp_is_the_likeliest(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "base"))
    greedy = model.generate([[3, 4, 5]], 6)[0].tolist()
    for settings in (
        {"temperature": 1e-4},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9},
    ):
        assert model.generate([[3, 4, 5]], 6, **settings)[0].tolist() == greedy
