"""An epoch's order: every row once, by (seed, epoch) alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora.data.batches import epoch_batches


@given(st.integers(1, 100), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_every_row_comes_once_in_full_batches(n: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(n, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_the_order_belongs_to_the_seed_and_the_epoch() -> None:
    first, again, next_epoch, other_seed = (
        np.concatenate(epoch_batches(50, 8, seed, epoch)) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, next_epoch)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, np.arange(50))
